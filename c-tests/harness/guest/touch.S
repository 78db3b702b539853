/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Writes a byte to each page of a range, in order.
 *
 *   %rdi  guest address of the first page
 *   %rcx  how many pages
 *   %rdx  bytes from one to the next
 *
 * Stops with 0.
 */
	.section .rodata
	.globl	guest_touch_start, guest_touch_end
	.balign	16
guest_touch_start:
	movb	$0x5a, (%rdi)
	add	%rdx, %rdi
	dec	%rcx
	jnz	guest_touch_start
	xor	%eax, %eax
	out	%eax, $0x10
	hlt
guest_touch_end:

	.section .note.GNU-stack, "", @progbits
