/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The guest of the examples: 64-bit code that runs at any address, in CPL 3 as well as in CPL 0. It visits pages in the order of
 * a list, measures how long the first touch of each takes, and checks what it finds there.
 *
 *   %rdi  guest address of page 0
 *   %rsi  the list: page numbers, 32 bits each
 *   %rcx  how many there are in the list
 *   %r8   where the first touches' times go: 64 bits a page, in ticks of the time stamp counter
 *   %r9   the pattern's factor
 *   %r10  check each word whose number is a multiple of this; 1 is all of them, 73 is 8 of them including the first and the last
 *
 * A page consists of 512 words of 64 bits. Word w of page p is (p + 1) * factor + w; but pages with (p & 0x70) == 0x70, one group
 * of sixteen in eight, are all zero. guest.c writes the same.
 *
 * At the end: `out` to port 0x10 with %eax = 0 if all was right, else 1 and then %rdi = the address, %rdx = what should be there.
 */
	.section .rodata
	.globl	guest_start, guest_end
	.balign	16
guest_start:
	mov	%rdi, %r15
	xor	%ebp, %ebp			# n: the place in the list
next_page:
	cmp	%rcx, %rbp
	je	all_right
	mov	(%rsi,%rbp,4), %r11d		# p: the page's number
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

	lea	1(%r11), %rax			# what word 0 should be, and how much more each checked word is
	imul	%r9, %rax
	mov	%r10, %r13
	and	$0x70, %r11d
	cmp	$0x70, %r11d
	jne	check
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
