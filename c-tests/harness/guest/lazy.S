/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Guests whose code, stack and tables are in memory that is absent at first. They lie page-aligned,
 * wherever the host puts them, and their parts are in pages of their own. Both check `pages` pages
 * of the pattern (guest/verify.S) at their first, second and last words, through a call to another
 * page, with something on the stack; then they go down the stack, a page a step.
 *
 * Long mode: %rdi first page, %rcx how many, %r8 the pattern's factor, %rdx depth of the stack in
 * pages. Protected mode: %edi, %ecx, %ebx (the factor's low half), %edx.
 *
 * Stop with 0 if all was right, or 1.
 */
	.section .rodata
	.globl	guest_lazy64_start, guest_lazy64_end
	.globl	guest_lazy32_start, guest_lazy32_end

	.balign	4096
guest_lazy64_start:
	mov	%rdx, %r12
	xor	%ebp, %ebp			# the page's number
next64:
	mov	%rbp, %rax
	inc	%rax
	imul	%r8, %rax
	push	%rcx
	push	%rax
	call	check64
	pop	%rcx
	pop	%rcx
	add	$4096, %rdi
	inc	%rbp
	cmp	%rcx, %rbp
	jb	next64
	mov	%r12, %rcx
	call	descend64
	cmp	%r12, %rax
	jne	wrong64
	xor	%eax, %eax
	out	%eax, $0x10
	hlt
wrong64:
	mov	$1, %eax
	out	%eax, $0x10
	hlt

	.balign	4096
	.skip	4096 - 5, 0x90			# the first instruction lies in two pages
check64:
	movabs	$0x1122334455667788, %rbx
	mov	8(%rsp), %rdx
	cmp	%rdx, (%rdi)
	jne	1f
	inc	%rdx
	cmp	%rdx, 8(%rdi)
	jne	1f
	add	$510, %rdx
	cmp	%rdx, 4088(%rdi)
	jne	1f
	movabs	$0x1122334455667788, %rdx
	cmp	%rdx, %rbx
	jne	1f
	ret
1:	jmp	wrong64

	.balign	4096
descend64:					# %rax: how deep it went
	test	%rcx, %rcx
	jz	1f
	sub	$4096, %rsp
	mov	%rcx, (%rsp)
	dec	%rcx
	call	descend64
	inc	%rax
	pop	%rcx
	add	$4088, %rsp
	ret
1:	xor	%eax, %eax
	ret
	.balign	4096
guest_lazy64_end:

	.code32
	.balign	4096
guest_lazy32_start:
	mov	%edx, %esi
	xor	%ebp, %ebp
next32:
	mov	%ebp, %eax
	inc	%eax
	imul	%ebx, %eax
	push	%ecx
	push	%eax
	call	check32
	pop	%ecx
	pop	%ecx
	add	$4096, %edi
	inc	%ebp
	cmp	%ecx, %ebp
	jb	next32
	mov	%esi, %ecx
	call	descend32
	cmp	%esi, %eax
	jne	wrong32
	xor	%eax, %eax
	out	%eax, $0x10
	hlt
wrong32:
	mov	$1, %eax
	out	%eax, $0x10
	hlt

	.balign	4096
	.skip	4096 - 2, 0x90
check32:
	cmpl	$0x11223344, 8(%esp)		# in two pages; compares with whatever
	mov	4(%esp), %edx
	cmp	%edx, (%edi)
	jne	1f
	inc	%edx
	cmp	%edx, 8(%edi)
	jne	1f
	add	$510, %edx
	cmp	%edx, 4088(%edi)
	jne	1f
	ret
1:	jmp	wrong32

	.balign	4096
descend32:
	test	%ecx, %ecx
	jz	1f
	sub	$4096, %esp
	mov	%ecx, (%esp)
	dec	%ecx
	call	descend32
	inc	%eax
	pop	%ecx
	add	$4092, %esp
	ret
1:	xor	%eax, %eax
	ret
	.balign	4096
guest_lazy32_end:
	.code64

	.section .note.GNU-stack, "", @progbits
