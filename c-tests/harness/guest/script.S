/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Does what a list of instructions says, one memory access each. machine.h has the same list as
 * struct step and enum.
 *
 *   %rdi  the first step, of 32 bytes each: operation, address, value, more (64 bits each)
 */
	.section .rodata
	.globl	guest_script_start, guest_script_end
	.balign	16
guest_script_start:
	mov	(%rdi), %rax
	mov	8(%rdi), %rsi
	mov	16(%rdi), %rdx
	lea	table(%rip), %rbx
	movslq	(%rbx,%rax,4), %rax
	add	%rbx, %rax
	jmp	*%rax
table:
	.long	stop - table
	.long	read8 - table, read16 - table, read32 - table, read64 - table
	.long	write8 - table, write16 - table, write32 - table, write64 - table
	.long	jump - table, add64 - table, call - table, copy - table
	.long	read128 - table, write128 - table, fill - table

stop:						# the host gets the value; if it runs us again we go on
	mov	%edx, %eax
	out	%eax, $0x10
	jmp	next
read8:
	movzbl	(%rsi), %eax
	jmp	store
read16:
	movzwl	(%rsi), %eax
	jmp	store
read32:
	mov	(%rsi), %eax
	jmp	store
read64:
	mov	(%rsi), %rax
	jmp	store
write8:
	mov	%dl, (%rsi)
	jmp	next
write16:
	mov	%dx, (%rsi)
	jmp	next
write32:
	mov	%edx, (%rsi)
	jmp	next
write64:
	mov	%rdx, (%rsi)
	jmp	next
jump:						# to the step at the address
	mov	%rsi, %rdi
	jmp	guest_script_start
add64:						# atomically; the value becomes what was there
	mov	%rdx, %rax
	lock xadd %rax, (%rsi)
	jmp	store
call:						# code in the guest's memory, that may change %rax and no other register
	mov	%rdx, %rax
	call	*%rsi
	jmp	store
copy:						# `more` bytes from the value to the address, with a string instruction
	mov	%rdi, %rbp
	mov	24(%rdi), %rcx
	mov	%rsi, %rdi
	mov	%rdx, %rsi
	rep movsb
	mov	%rbp, %rdi
	jmp	next
read128:					# to `value` and `more`
	movdqu	(%rsi), %xmm0
	movdqu	%xmm0, 16(%rdi)
	jmp	next
write128:
	movdqu	16(%rdi), %xmm0
	movdqu	%xmm0, (%rsi)
	jmp	next
fill:						# `more` times 8 bytes of the value, with a string instruction
	mov	%rdi, %rbp
	mov	24(%rdi), %rcx
	mov	%rsi, %rdi
	mov	%rdx, %rax
	rep stosq
	mov	%rbp, %rdi
	jmp	next

store:
	mov	%rax, 16(%rdi)
next:
	add	$32, %rdi
	jmp	guest_script_start
guest_script_end:

	.section .note.GNU-stack, "", @progbits
