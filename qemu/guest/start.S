/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * From the reset vector to main() in long mode. The ROM only copies: everything after runs from
 * RAM, which migrates.
 */
	.set	PAYLOAD, 0x10000	/* where guest.ld links what runs from RAM */
	.set	TRAMPOLINE, 0x8000	/* where the other CPUs wake up: page 8, as in guest.c */
	.set	TABLES, 0x80000		/* six pages of page tables */
	.set	STACKS, 0x90000		/* 4 KiB a CPU, downwards: see MAX_CPUS in guest.c */

/* ---- in the ROM, the last 64 KiB below 4 GiB ---- */
	.section .rom, "ax"
	.code16
reset:
	cli
	cs lgdtl (rom_gdt_pointer - reset)
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$0x08, $copy

	.code32
copy:
	movw	$0x10, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	cld
	movl	$payload_rom, %esi
	movl	$PAYLOAD, %edi
	movl	$payload_words, %ecx
	rep movsl
	movl	$trampoline_16, %esi
	movl	$TRAMPOLINE, %edi
	movl	$(trampoline_16_end - trampoline_16), %ecx
	rep movsb
	movl	$tables, %eax
	jmp	*%eax

	.balign	8
/* Marked as accessed, as nothing can be written here. */
rom_gdt:
	.quad	0, 0x00cf9b000000ffff, 0x00cf93000000ffff
rom_gdt_pointer:
	.word	. - rom_gdt - 1
	.long	rom_gdt

	.section .reset, "ax"
	.code16
	.byte	0xe9		/* jmp reset, from offset 0xfff0 to offset 0 of the same 64 KiB */
	.word	0x10000 - 0xfff3
	.balign	16

/* ---- in RAM ---- */
	.section .text.start, "ax"

/* Another CPU, after INIT and SIPI: CS is the trampoline's segment. */
	.code16
trampoline_16:
	cli
	cs lgdtl (gdt_pointer - trampoline_16)
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$0x08, $long_mode
gdt_pointer:
	.word	gdt_end - gdt - 1
	.long	gdt
trampoline_16_end:

	.code32
/* The first 4 GiB, mapped as they are by pages of 2 MiB that ring 3 may use. */
tables:
	lgdtl	gdt_pointer
	movl	$TABLES, %edi
	xorl	%eax, %eax
	movl	$(6 * 1024), %ecx
	rep stosl
	movl	$(TABLES + 0x1007), TABLES
	movl	$(TABLES + 0x2007), %eax
	movl	$(TABLES + 0x1000), %edi
	movl	$4, %ecx
1:	movl	%eax, (%edi)
	addl	$0x1000, %eax
	addl	$8, %edi
	loop	1b
	movl	$0x87, %eax	/* present, writable, user, large */
	movl	$(TABLES + 0x2000), %edi
	movl	$2048, %ecx
2:	movl	%eax, (%edi)
	addl	$0x200000, %eax
	addl	$8, %edi
	loop	2b

long_mode:
	movw	$0x10, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movl	$0x20, %eax	/* CR4.PAE */
	movl	%eax, %cr4
	movl	$TABLES, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx	/* EFER.LME */
	rdmsr
	orl	$0x100, %eax
	wrmsr
	movl	%cr0, %eax
	/* Paging on; caches on: after a reset they are off. */
	orl	$0x80000000, %eax
	andl	$0x9fffffff, %eax
	movl	%eax, %cr0
	ljmpl	$0x18, $start_64

	.code64
start_64:
	movl	$1, %edi
	lock xaddl %edi, cpus_started(%rip)
	movl	%edi, %eax
	shll	$12, %eax
	movl	$STACKS, %esp
	subl	%eax, %esp
	call	set_up		/* (cpu) */
	/*
	 * To ring 3, with the right to do I/O: where KVM has no hardware virtualisation it
	 * interprets ring 0.
	 */
	movl	%eax, %edi
	movq	%rsp, %rax
	pushq	$0x23
	pushq	%rax
	pushq	$0x3002		/* IOPL 3, interrupts off */
	pushq	$0x2b
	pushq	$work_64
	iretq
work_64:
	call	work		/* (cpu) */
	ud2

	.balign	8
gdt:
	.quad	0, 0x00cf9b000000ffff, 0x00cf93000000ffff	/* 08: code, 10: data; 32 bits */
	.quad	0x00af9b000000ffff				/* 18: code, 64 bits */
	.quad	0x00cff3000000ffff, 0x00affb000000ffff		/* 20: data, 28: code; ring 3 */
gdt_end:

	.section .note.GNU-stack, "", @progbits
