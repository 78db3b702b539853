/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Writes a byte to each page of a list, and notes how long each takes.
 *
 *   %rdi  guest address of page 0
 *   %rsi  guest address of the list: page numbers, 32 bits each
 *   %rcx  how many
 *   %r8   guest address of the times: 32 bits each, in ticks of the time stamp counter
 *
 * Stops with 0.
 */
	.section .rodata
	.globl	guest_walk_start, guest_walk_end
	.balign	16
guest_walk_start:
	mov	(%rsi), %r9d
	add	$4, %rsi
	shl	$12, %r9
	add	%rdi, %r9
	rdtsc
	shl	$32, %rdx
	or	%rax, %rdx
	mov	%rdx, %r10
	mov	$0x5a, %al
	xchg	%al, (%r9)		/* locked: done before what follows */
	rdtsc
	shl	$32, %rdx
	or	%rax, %rdx
	sub	%r10, %rdx
	mov	%edx, (%r8)
	add	$4, %r8
	dec	%rcx
	jnz	guest_walk_start
	xor	%eax, %eax
	out	%eax, $0x10
	hlt
guest_walk_end:

	.section .note.GNU-stack, "", @progbits
