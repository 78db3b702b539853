/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memory that is one block for the library and several mappings for the kernel: of several files
 * side by side, or of one mapping that was cut by what the VMM has done with a part of it (madvise,
 * mbind, mlock). The kernel's installs stop at a mapping's end.
 */
#define _GNU_SOURCE
#include "slot_vm.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGES = 96, HUGE_PAGES = 6, THIRDS = 3 };

static uint64_t length_of(enum backing backing)
{
	return backing == HUGETLB ? HUGE_PAGES * HUGE_PAGE : PAGES * PAGE;
}

/*
 * The middle third is of another file, and the last of the first file again, from its beginning on.
 */
static void mix(const struct ram *ram)
{
	uint64_t third = ram->len / THIRDS;
	int other = SYS(memfd_create("another file", ram->backing == HUGETLB ? MFD_HUGETLB | 21u << 26 : 0));
	if (ram->backing == HUGETLB)
		/* the first file keeps what it has reserved */
		huge_pages_provide(third / HUGE_PAGE);
	SYS(ftruncate(other, 2 * third));
	CHECK(mmap(ram->hva + third, third, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, other, third) != MAP_FAILED,
	      "mmap: %s", strerror(errno));
	CHECK(mmap(ram->hva + 2 * third, third, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, ram->fd, third) !=
		      MAP_FAILED,
	      "mmap: %s", strerror(errno));
	SYS(close(other));
}

/* Core dumps are to leave out the middle third: three mappings. */
static void cut(const struct ram *ram)
{
	uint64_t third = ram->len / THIRDS;
	SYS(madvise(ram->hva + third, third, MADV_DONTDUMP));
}

/* Guests at both privilege levels and the VMM's stream, each across a border; and discards. */
static void use(struct slot_vm *s)
{
	uint64_t page = s->ram.page / PAGE, units = s->ram.len / s->ram.page, third = s->pages / THIRDS;
	OK(source_install(&s->source, s->m.library, RAM_GPA + third * PAGE - s->ram.page, 2 * s->ram.page));
	s->source.window = true;
	struct vcpu *v = slot_vm_add_vcpu(s, 3);
	slot_vm_visit(s, v, 0, s->pages / 2, READ_FIRST);
	vcpu_detach(v);
	v = slot_vm_add_vcpu(s, 0);
	slot_vm_visit(s, v, s->pages / 2, s->pages - s->pages / 2, READ_FIRST);
	vcpu_detach(v);
	slot_vm_expect_all_present(s);
	if (s->ram.backing != ANON)
		pattern_check(&s->source.pattern, s->ram.hva, 0, s->pages);
	OK(kvmfault_pages_discard(s->m.library, RAM_GPA, s->ram.len));
	EQUAL("pages absent", kvmfault_pages_absent(s->m.library), units);
	OK(source_install(&s->source, s->m.library, RAM_GPA, s->ram.len));
	v = slot_vm_add_vcpu(s, 3);
	slot_vm_visit(s, v, 0, s->pages, READ_FIRST);
	vcpu_detach(v);
	OK(kvmfault_pages_discard(s->m.library, RAM_GPA, s->ram.len));
	OK(kvmfault_pages_zero(s->m.library, RAM_GPA, s->ram.len));
	v = slot_vm_add_vcpu(s, 3);
	for (uint64_t at = 0; at < s->pages; at += page)
		EQUAL("a word of zeros", slot_vm_read(s, v, RAM_GPA + at * PAGE), 0);
	vcpu_detach(v);
}

static void used(enum backing backing, void (*prepare)(const struct ram *), bool live)
{
	struct slot_vm s;
	slot_vm_attach(&s, backing, length_of(backing), test_mechanism(), NULL);
	if (!live)
		prepare(&s.ram);
	struct kvmfault_memslot slot = slot_on(&s.ram, RAM_SLOT, RAM_GPA);
	if (prepare == mix)
		slot.fd = -1;
	OK(kvmfault_memslot_set(s.m.library, &slot));
	if (live)
		prepare(&s.ram);
	use(&s);
	slot_vm_destroy(&s);
}

static void files_memfd(void)
{
	used(MEMFD, mix, false);
}

static void files_hugetlb(void)
{
	used(HUGETLB, mix, false);
}

static void cut_anon(void)
{
	used(ANON, cut, false);
}

static void cut_memfd(void)
{
	used(MEMFD, cut, false);
}

static void cut_hugetlb(void)
{
	used(HUGETLB, cut, false);
}

static void live_anon(void)
{
	used(ANON, cut, true);
}

static void live_memfd(void)
{
	used(MEMFD, cut, true);
}

static const struct test_case cases[] = {
	{ "files-memfd", files_memfd, true }, { "files-hugetlb", files_hugetlb, true },
	{ "cut-anon", cut_anon, true },       { "cut-memfd", cut_memfd, true },
	{ "cut-hugetlb", cut_hugetlb, true }, { "live-anon", live_anon, true },
	{ "live-memfd", live_memfd, true },
};
TEST_MAIN(cases)
