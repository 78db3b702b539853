/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A guest at CPL 0 with the in-kernel local APIC's timer, kvmclock and steal time. Its code, stack,
 * IDT and the pages that KVM writes are in memory that is absent at first.
 *
 *   %rdi  what the host and it share: struct clock_guest in guests.c (ordinary memory)
 *
 * The handler counts ticks in a page of its own. Between ticks the guest checks pages of the
 * pattern, then halts until there were enough ticks. It samples kvmclock at the start, after the
 * pages and at the end: a consistent copy of the structure, and the TSC.
 */
	.section .rodata
	.globl	guest_clock_start, guest_clock_end, guest_clock_handler

/* struct clock_guest */
#define IDT_POINTER	0
#define TICKS		16	/* guest address of the counter */
#define WANTED		24
#define INITIAL_COUNT	32
#define CLOCK		40	/* guest address of struct pvclock_vcpu_time_info; 0: leave it */
#define STEAL		48	/* guest address of struct kvm_steal_time; 0: leave it */
#define DATA		56
#define PAGES		64
#define FACTOR		72
#define DONE		80	/* pages that were right */
#define SAMPLES		128	/* three times 64 bytes: the structure, then the TSC at 32 */

	.balign	4096
guest_clock_start:
	mov	%rdi, %r15
	mov	STEAL(%r15), %rax
	test	%rax, %rax
	jz	1f
	or	$1, %rax
	mov	%rax, %rdx
	shr	$32, %rdx
	mov	$0x4b564d03, %ecx
	wrmsr
1:	mov	CLOCK(%r15), %rax
	test	%rax, %rax
	jz	1f
	or	$1, %rax
	mov	%rax, %rdx
	shr	$32, %rdx
	mov	$0x4b564d01, %ecx
	wrmsr
1:	lea	SAMPLES(%r15), %rdi
	call	sample

	lidt	IDT_POINTER(%r15)
	mov	$0x1b, %ecx			# IA32_APIC_BASE: x2APIC
	rdmsr
	or	$0xc00, %eax
	wrmsr
	xor	%edx, %edx
	mov	$0x80f, %ecx			# spurious interrupts: software enable
	mov	$0x1ff, %eax
	wrmsr
	mov	$0x83e, %ecx			# divide by 1
	mov	$0xb, %eax
	wrmsr
	mov	$0x832, %ecx			# timer: periodic, vector 0x40
	mov	$0x20040, %eax
	wrmsr
	mov	$0x838, %ecx
	mov	INITIAL_COUNT(%r15), %eax
	wrmsr
	sti

	mov	DATA(%r15), %rsi
	mov	PAGES(%r15), %rcx
	mov	FACTOR(%r15), %rdx
	mov	%rdx, %rax
next_page:
	cmp	%rax, (%rsi)
	jne	stop
	lea	511(%rax), %rbx
	cmp	%rbx, 4088(%rsi)
	jne	stop
	add	%rdx, %rax
	add	$4096, %rsi
	incq	DONE(%r15)
	dec	%rcx
	jnz	next_page
	lea	SAMPLES + 64(%r15), %rdi
	call	sample

	mov	TICKS(%r15), %rbx
wait:
	cli
	mov	(%rbx), %rax
	cmp	WANTED(%r15), %rax
	jae	enough
	sti					# takes effect after the next instruction: no tick is missed
	hlt
	jmp	wait
enough:
	lea	SAMPLES + 128(%r15), %rdi
	call	sample
stop:
	cli
	xor	%eax, %eax
	out	%eax, $0x10
	jmp	stop

sample:						# 32 bytes of kvmclock and the TSC, of one version
	mov	CLOCK(%r15), %rsi
	test	%rsi, %rsi
	jz	2f
1:	mov	(%rsi), %r8d
	test	$1, %r8d
	jnz	1b
	lfence
	mov	(%rsi), %r9
	mov	8(%rsi), %r10
	mov	16(%rsi), %r11
	mov	24(%rsi), %r12
	rdtsc
	lfence
	cmp	%r8d, (%rsi)
	jne	1b
	mov	%r9, (%rdi)
	mov	%r10, 8(%rdi)
	mov	%r11, 16(%rdi)
	mov	%r12, 24(%rdi)
	shl	$32, %rdx
	or	%rdx, %rax
	mov	%rax, 32(%rdi)
2:	ret

	.balign	4096
guest_clock_handler:
	push	%rax
	push	%rcx
	push	%rdx
	mov	TICKS(%r15), %rax		# the guest keeps %r15
	incq	(%rax)
	mov	$0x80b, %ecx			# end of interrupt
	xor	%eax, %eax
	xor	%edx, %edx
	wrmsr
	pop	%rdx
	pop	%rcx
	pop	%rax
	iretq
	.balign	4096
guest_clock_end:

	.section .note.GNU-stack, "", @progbits
