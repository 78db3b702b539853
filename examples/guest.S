/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The guest of the examples: 64-bit code that runs at any address, at CPL 3 and at CPL 0. It visits
 * the pages of a list, measures how long the first touch of each takes, and checks its content.
 *
 *   %rdi  guest address of page 0
 *   %rsi  the list: page numbers, 32 bits each
 *   %rcx  length of the list
 *   %r8   where the times of the first touches go: for each page 64 bits, in ticks of the time
 *         stamp counter
 *   %r9   factor of the pattern; 0: all pages are zero
 *   %r10  check each word whose number is a multiple of this: 1 checks all words, 73 checks 8
 *         words, among them the first and the last
 *   %r14  report when this number of pages has been checked
 *
 * A page consists of 512 words of 64 bits. Word w of page p is (p + 1) * factor + w. Pages with
 * (p & 0x70) == 0x70, one group of sixteen in eight, are all zero. guest.c has the same rule for
 * the host.
 *
 * The report is an `out` to port 0x11. At the end comes an `out` to port 0x10, with %eax = 0 if all
 * pages were right; else with %eax = 1, %rdi = the address of a wrong word, %rdx = the right word.
 */
	.section .rodata
	.globl	guest_start, guest_end
	.balign	16
guest_start:
	mov	%rdi, %r15
	xor	%ebp, %ebp			# n: the place in the list
next_page:
	cmp	%r14, %rbp
	jne	visit
	out	%eax, $0x11
visit:
	cmp	%rcx, %rbp
	je	all_right
	mov	(%rsi,%rbp,4), %r11d		# p: the number of the page
	mov	%r11, %rdi
	shl	$12, %rdi
	add	%r15, %rdi

	rdtsc
	shl	$32, %rdx
	lea	(%rax,%rdx), %r12
	mov	(%rdi), %rbx			# the first touch: here the page is absent
	rdtsc
	shl	$32, %rdx
	add	%rdx, %rax
	sub	%r12, %rax
	mov	%rax, (%r8,%rbp,8)

	lea	1(%r11), %rax			# %rax: what word 0 should be
	imul	%r9, %rax
	mov	%r10, %r13			# %r13: by how much the next checked word is larger
	test	%r9, %r9
	jz	zero_page
	and	$0x70, %r11d
	cmp	$0x70, %r11d
	jne	check
zero_page:
	xor	%eax, %eax
	xor	%r13d, %r13d
check:
	xor	%ebx, %ebx			# w
next_word:
	cmp	%rax, (%rdi,%rbx,8)
	jne	wrong
	add	%r13, %rax
	add	%r10, %rbx
	cmp	$512, %rbx
	jb	next_word

	inc	%rbp
	jmp	next_page

all_right:
	xor	%eax, %eax
	out	%eax, $0x10
	hlt
wrong:
	lea	(%rdi,%rbx,8), %rdi
	mov	%rax, %rdx			# `out` needs %eax
	mov	$1, %eax
	out	%eax, $0x10
	hlt
guest_end:

	.section .note.GNU-stack, "", @progbits
