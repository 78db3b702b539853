/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Visits 4 KiB pages in the order of a list, and checks what is in them.
 *
 *   %rdi guest address of page 0 %rsi the list: page numbers, 32 bits each %rcx how many there are
 *   in the list %r8 the pattern's factor %r9 the pattern's zero mask %r10 check each word whose
 *   number is a multiple of this: 1 is all of them, 73 is 8 of them including the first and the
 *   last %r12 0: the first touch is a read. 1: it is a write, of the complement of what the last
 *   word should be, to the last word;
 *         the last word is then checked against that
 *
 * Word w of page p (512 words of 64 bits) should be (p + 1) * factor + w, or zero if mask != 0 and
 * (p & mask) == mask.
 *
 * Stops with 0 if all was right, or with 1 and %rdi = the address, %rdx = what should be there,
 * %rbx = what was there.
 */
	.section .rodata
	.globl	guest_verify_start, guest_verify_end
	.balign	16
guest_verify_start:
	mov	%rdi, %r15
	xor	%ebp, %ebp			# n: the place in the list
next_page:
	cmp	%rcx, %rbp
	je	all_right
	mov	(%rsi,%rbp,4), %r11d		# p: the page's number
	mov	%r11, %rdi
	shl	$12, %rdi
	add	%r15, %rdi

	lea	1(%r11), %rdx			# what word 0 should be, and how much more each checked word is
	imul	%r8, %rdx
	mov	%r10, %r13
	lea	511(%rdx), %r14			# what the last word should be
	test	%r9, %r9
	jz	touch
	and	%r9, %r11
	cmp	%r9, %r11
	jne	touch
	xor	%edx, %edx
	xor	%r13d, %r13d
	xor	%r14d, %r14d
touch:
	test	%r12, %r12
	jz	check
	not	%r14
	mov	%r14, 4088(%rdi)
check:
	xor	%eax, %eax			# w
next_word:
	mov	(%rdi,%rax,8), %rbx
	cmp	%rdx, %rbx
	jne	wrong
	add	%r13, %rdx
	add	%r10, %rax
	cmp	$511, %rax
	jb	next_word
	mov	$511, %eax
	mov	%r14, %rdx
	mov	(%rdi,%rax,8), %rbx
	cmp	%rdx, %rbx
	jne	wrong

	inc	%rbp
	jmp	next_page

all_right:
	xor	%eax, %eax
	out	%eax, $0x10
	hlt
wrong:
	lea	(%rdi,%rax,8), %rdi
	mov	$1, %eax
	out	%eax, $0x10
	hlt
guest_verify_end:

	.section .note.GNU-stack, "", @progbits
