/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pages that the guest gives back (kvmfault_pages_give_back): a balloon, free page reporting,
 * virtio-mem. Their memory is freed, the next touch finds zeros, and no fault, fill or pending call
 * fetches them again.
 */
#define _GNU_SOURCE
#include "fill_vm.h"
#include "resolver_vm.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { UNITS = 16 };

static uint64_t gpa_of(const struct ram *ram, uint64_t unit)
{
	return RAM_GPA + unit * ram->page;
}

/* How many units have memory. */
static uint64_t in_use(const struct ram *ram)
{
	uint64_t used = 0;
	struct stat st;
	if (ram->fd >= 0) {
		SYS(fstat(ram->fd, &st));
		return st.st_blocks * 512 / ram->page;
	}
	unsigned char *resident = malloc(ram->len / PAGE);
	SYS(mincore(ram->hva, ram->len, resident));
	for (uint64_t page = 0; page < ram->len / PAGE; page++)
		used += resident[page] & 1;
	free(resident);
	return used;
}

static void give_back(const struct machine *m, const struct ram *ram, uint64_t first, uint64_t count)
{
	uint64_t before = machine_stats(m).pages_given_back;
	OK(kvmfault_pages_give_back(m->library, gpa_of(ram, first), count * ram->page));
	EQUAL("pages given back", machine_stats(m).pages_given_back - before, count);
	for (uint64_t unit = first; unit < first + count; unit++)
		EQUAL("the page's state", kvmfault_pages_state(m->library, gpa_of(ram, unit)), KVMFAULT_PAGE_PRESENT);
}

/* Four units that were given back: whatever touches them finds zeros, and what is written stays. */
static void touch(struct slot_vm *s, struct vcpu *v, uint64_t unit)
{
	EQUAL("what a vCPU reads", slot_vm_read(s, v, gpa_of(&s->ram, unit) + 8), 0);
	slot_vm_write(s, v, gpa_of(&s->ram, unit) + 8, 0x1234);
	EQUAL("what a vCPU reads back", slot_vm_read(s, v, gpa_of(&s->ram, unit) + 8), 0x1234);
	EQUAL("what a thread reads", *(volatile uint64_t *)(s->ram.hva + unit * s->ram.page + 8), 0x1234);
	unit++;
	slot_vm_write(s, v, gpa_of(&s->ram, unit) + 16, 0x5678);
	EQUAL("what a vCPU reads back", slot_vm_read(s, v, gpa_of(&s->ram, unit) + 16), 0x5678);
	EQUAL("the rest of the page", slot_vm_read(s, v, gpa_of(&s->ram, unit)), 0);
	unit++;
	EQUAL("what a thread reads", *(volatile uint64_t *)(s->ram.hva + unit * s->ram.page), 0);
	*(volatile uint64_t *)(s->ram.hva + unit * s->ram.page) = 0x9abc;
	EQUAL("what a vCPU reads", slot_vm_read(s, v, gpa_of(&s->ram, unit)), 0x9abc);
	unit++;
	uint64_t word = 1;
	struct iovec local = { &word, 8 }, remote = { s->ram.hva + unit * s->ram.page, 8 };
	EQUAL("bytes that a system call reads", process_vm_readv(getpid(), &local, 1, &remote, 1, 0), 8);
	EQUAL("what it reads", word, 0);
	OK(kvmfault_pages_resolve(s->m.library, gpa_of(&s->ram, unit), s->ram.page));
	OK(kvmfault_vcpu_resolve(v->handle, gpa_of(&s->ram, unit), 8));
	EQUAL("what a vCPU reads", slot_vm_read(s, v, gpa_of(&s->ram, unit)), 0);
}

/*
 * Units that are there, absent, and lost, of which the guest reads what it ought to, and then gives
 * some back.
 */
static void reread(enum memory_kind kind, uint32_t flags)
{
	struct slot_vm s;
	slot_vm_create_of(&s, kind, UNITS, flags);
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		struct vcpu *v = slot_vm_add_vcpu(&s, cpl);
		uint64_t base = cpl ? UNITS / 2 : 0, words = s.ram.page / PAGE;
		int64_t absent = kvmfault_pages_absent(s.m.library);
		for (uint64_t unit = base; unit < base + 6; unit++)
			EQUAL("before", slot_vm_read(&s, v, gpa_of(&s.ram, unit)),
			      pattern_word(&s.source.pattern, unit * words, 0));
		UNTIL(kvmfault_pages_absent(s.m.library) == absent - 6);
		/* All pages are present but the last two: one was never fetched, one is lost. */
		uint64_t used = in_use(&s.ram);
		unsigned long calls = s.source.total;
		give_back(&s.m, &s.ram, base, 4);
		EQUAL("units in use", used - in_use(&s.ram), 4);
		EQUAL("absent pages", kvmfault_pages_absent(s.m.library), absent - 6);
		touch(&s, v, base);
		EQUAL("a neighbour", slot_vm_read(&s, v, gpa_of(&s.ram, base + 4)),
		      pattern_word(&s.source.pattern, (base + 4) * words, 0));
		OK(kvmfault_pages_lost(s.m.library, gpa_of(&s.ram, base + 6), s.ram.page));
		give_back(&s.m, &s.ram, base + 4, 4);
		EQUAL("absent pages", kvmfault_pages_absent(s.m.library), absent - 8);
		EQUAL("units in use", in_use(&s.ram), used - 4 - 2 + 4);
		/* What comes late is skipped. */
		REFUSED(source_install(&s.source, s.m.library, gpa_of(&s.ram, base + 4), 4 * s.ram.page), EEXIST,
			"present");
		touch(&s, v, base + 4);
		/* Again, what was written since. */
		give_back(&s.m, &s.ram, base, 8);
		EQUAL("units in use", in_use(&s.ram), used - 6);
		touch(&s, v, base);
		touch(&s, v, base + 4);
		EQUAL("resolver calls", s.source.total, calls);
		/* The other meaning: missing, and fetched again. */
		OK(kvmfault_pages_discard(s.m.library, gpa_of(&s.ram, base), s.ram.page));
		EQUAL("discarded", slot_vm_read(&s, v, gpa_of(&s.ram, base)),
		      pattern_word(&s.source.pattern, base * words, 0));
		EQUAL("resolver calls", s.source.total, calls + 1);
		/* a reader may be a moment behind */
		UNTIL(kvmfault_pages_state(s.m.library, gpa_of(&s.ram, base)) == KVMFAULT_PAGE_PRESENT);
		vcpu_detach(v);
	}
	slot_vm_destroy(&s);
}

static void reread_anon(void)
{
	reread(OF_ANON, 0);
}
static void reread_memfd(void)
{
	reread(OF_MEMFD, 0);
}
static void reread_hugetlb(void)
{
	reread(OF_HUGETLB, 0);
}
static void reread_shared_anon(void)
{
	reread(OF_SHARED_ANON, 0);
}
static void slow(void)
{
	reread(OF_ANON, KVMFAULT_MEMSLOT_SLOW);
	reread(OF_MEMFD, KVMFAULT_MEMSLOT_SLOW);
}

/* ---- while other threads install the pages ---- */

/*
 * A fill is under way, and one of its calls too. What was given back stays away, also when huge
 * pages are made at the end.
 */
static void filling(enum backing backing)
{
	struct fill_vm t;
	fill_vm_create(&t, backing, PAGES * PAGE);
	struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
	const uint64_t first = 50, count = PAGES / 2 - 50;
	slot_vm_visit(&t.s, v, 0, 100, READ_FIRST);
	t.fill_held = true;
	struct kvmfault_fill *fill = fill_vm_start(&t, NULL);
	UNTIL(t.calls == 1);
	give_back(&t.s.m, &t.s.ram, first, count);
	EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), PAGES / 2);
	t.fill_held = false;
	OK(kvmfault_fill_wait(fill, 60000));
	kvmfault_fill_free(fill);
	EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), 0);
	EQUAL("pages in use", in_use(&t.s.ram), PAGES - count);
	slot_vm_visit(&t.s, v, 0, first, READ_FIRST);
	slot_vm_visit(&t.s, v, first + count, PAGES - first - count, READ_FIRST);
	touch(&t.s, v, first);
	touch(&t.s, v, first + count - 4);
	vcpu_detach(v);
	slot_vm_destroy(&t.s);
}

/* A fill has ended: the memory is the VMM's own. */
static void filled(enum backing backing)
{
	struct fill_vm t;
	fill_vm_create(&t, backing, PAGES * PAGE);
	struct vcpu *v = slot_vm_add_vcpu(&t.s, 3);
	fill_vm_fill_all(&t, NULL);
	slot_vm_visit(&t.s, v, 0, PAGES, READ_FIRST);
	give_back(&t.s.m, &t.s.ram, 100, 600);
	EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), 0);
	EQUAL("pages in use", in_use(&t.s.ram), PAGES - 600);
	touch(&t.s, v, 100);
	OK(kvmfault_memslot_set_fast_only(t.s.m.library, RAM_SLOT, 1));
	touch(&t.s, v, 200);
	give_back(&t.s.m, &t.s.ram, 100, 600);
	touch(&t.s, v, 100);
	touch(&t.s, v, 300);
	EQUAL("pages in use", in_use(&t.s.ram), PAGES - 600 + 8);
	slot_vm_visit(&t.s, v, 0, 100, READ_FIRST);
	slot_vm_visit(&t.s, v, 700, PAGES - 700, READ_FIRST);
	vcpu_detach(v);
	slot_vm_destroy(&t.s);
}

static void filling_anon(void)
{
	filling(ANON);
}
static void filling_memfd(void)
{
	filling(MEMFD);
}
static void filled_anon(void)
{
	filled(ANON);
}
static void filled_memfd(void)
{
	filled(MEMFD);
}

static uint64_t word_read(const struct vcpu *v)
{
	return resolver_vm.steps[2 * v->number].value;
}

/*
 * Announced pages that a vCPU and a thread wait for: they go on, with zeros. What was announced
 * comes too late.
 */
static void *look_at_page_6(void *seen)
{
	*(_Atomic uint64_t *)seen = *(volatile uint64_t *)(resolver_vm.ram.hva + 6 * PAGE);
	return NULL;
}

static void pending(void)
{
	_Atomic uint64_t seen = 1;
	pthread_t device;
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, 2, 3);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	resolver_vm_load_read(v, 5);
	vcpu_start(v, resolver_vm_run_to_stop, NULL);
	CHECK(!pthread_create(&device, NULL, look_at_page_6, &seen), "pthread_create");
	UNTIL(resolver_vm.calls == 2);
	UNTIL(kvmfault_pages_state(resolver_vm.m.library, RAM_GPA + 5 * PAGE) == KVMFAULT_PAGE_RESOLVING);
	give_back(&resolver_vm.m, &resolver_vm.ram, 4, 4);
	vcpu_join(v);
	pthread_join(device, NULL);
	EQUAL("what the guest reads", word_read(v), 0);
	EQUAL("what the thread reads", seen, 0);
	EQUAL("pages withdrawn", kvmfault_pages_withdraw(resolver_vm.m.library, RAM_GPA, resolver_vm.ram.len), 0);
	REFUSED(source_install(&resolver_vm.source, resolver_vm.m.library, RAM_GPA + 4 * PAGE, 4 * PAGE), EEXIST,
		"present");
	EQUAL("what is there", ((uint64_t *)resolver_vm.ram.hva)[5 * PAGE / 8], 0);
	EQUAL("calls", resolver_vm.calls, 2);
	resolver_vm_tear_down();
}

/* A call of the resolver is under way. */
static atomic_bool held;
static atomic_int answer;

static int resolve_when_let(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	int mine = answer;
	resolver_vm.calls++;
	while (held)
		wait_a_little();
	resolver_vm.finished++;
	if (mine != KVMFAULT_RESOLVED)
		return mine;
	return source_install(&resolver_vm.source, vm, fault->gpa, PAGE);
}

static void resolving(void)
{
	const int answers[] = { KVMFAULT_RESOLVED, KVMFAULT_PENDING, KVMFAULT_LOST, KVMFAULT_RETRY, -EIO };
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolve_when_let;
	options.reader_threads = 4;
	resolver_vm_set_up_with(&options, MEMFD, 2, 3);
	struct vcpu *asks = resolver_vm.m.vcpu[0], *waits = resolver_vm.m.vcpu[1];
	for (unsigned n = 0; n < sizeof(answers) / sizeof(*answers); n++) {
		uint64_t page = 7 * n + 3;
		held = true;
		answer = answers[n];
		resolver_vm.calls = resolver_vm.finished = 0;
		resolver_vm_load_read(asks, page);
		resolver_vm_load_read(waits, page);
		vcpu_start(asks, resolver_vm_run_to_stop, NULL);
		UNTIL(resolver_vm.calls == 1);
		vcpu_start(waits, resolver_vm_run_to_stop, NULL);
		give_back(&resolver_vm.m, &resolver_vm.ram, page, 1);
		vcpu_join(waits);
		EQUAL("what a waiting guest reads", word_read(waits), 0);
		EQUAL("calls that have returned", resolver_vm.finished, 0);
		held = false;
		vcpu_join(asks);
		EQUAL("what the asking guest reads", word_read(asks), 0);
		UNTIL(resolver_vm.finished == 1);
		EQUAL("calls", resolver_vm.calls, 1);
		vcpu_detach(asks);
		vcpu_detach(waits);
		EQUAL("the page's state", kvmfault_pages_state(resolver_vm.m.library, RAM_GPA + page * PAGE),
		      KVMFAULT_PAGE_PRESENT);
		/* And the call's end has left nothing behind. */
		answer = KVMFAULT_RESOLVED;
		OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA + page * PAGE, PAGE));
		OK(kvmfault_pages_resolve(resolver_vm.m.library, RAM_GPA + page * PAGE, PAGE));
		pattern_check(&resolver_vm.source.pattern, resolver_vm.ram.hva + page * PAGE, page, 1);
	}
	resolver_vm_tear_down();
}

/* ---- what can't be dropped ---- */

static void locked(enum backing backing)
{
	struct slot_vm s;
	slot_vm_create(&s, backing, 64 * PAGE, 0, 0);
	struct vcpu *v = slot_vm_add_vcpu(&s, 3);
	slot_vm_visit(&s, v, 0, 40, READ_FIRST);
	OK(kvmfault_pages_lost(s.m.library, RAM_GPA + 41 * PAGE, PAGE));
	UNTIL(kvmfault_pages_absent(s.m.library) == 23);
	if (mlock2(s.ram.hva + 32 * PAGE, 16 * PAGE, MLOCK_ONFAULT) != 0)
		skip("mlock2: %s (RLIMIT_MEMLOCK)", strerror(errno));
	unsigned long calls = s.source.total;
	REFUSED(kvmfault_pages_give_back(s.m.library, RAM_GPA, s.ram.len), EINVAL, "mlock");
	char page[64];
	snprintf(page, sizeof(page), "page at hva %p", (void *)(s.ram.hva + 32 * PAGE));
	CHECK(strstr(kvmfault_last_error(), page), "%s: doesn't name the %s", kvmfault_last_error(), page);
	slot_vm_visit(&s, v, 32, 8, READ_FIRST);
	EQUAL("an absent page", kvmfault_pages_state(s.m.library, RAM_GPA + 40 * PAGE), KVMFAULT_PAGE_ABSENT);
	EQUAL("a lost page", kvmfault_pages_state(s.m.library, RAM_GPA + 41 * PAGE), KVMFAULT_PAGE_LOST);
	slot_vm_step(&s, v, (struct step){ READ64, RAM_GPA + 41 * PAGE, 0, 0 });
	EQUAL("a vCPU at a lost page", kvmfault_vcpu_run(v->handle), KVMFAULT_MEMORY_ERROR);
	EQUAL("resolver calls", s.source.total, calls);
	slot_vm_visit(&s, v, 42, 6, READ_FIRST); /* is fetched, as ever */
	EQUAL("resolver calls", s.source.total, calls + 6);
	touch(&s, v, 0);
	touch(&s, v, 28);
	SYS(munlock(s.ram.hva, s.ram.len));
	give_back(&s.m, &s.ram, 0, 64);
	for (int unit = 0; unit < 64; unit += 4)
		touch(&s, v, unit);
	EQUAL("resolver calls", s.source.total, calls + 6);
	vcpu_detach(v);
	slot_vm_destroy(&s);
}

static void locked_anon(void)
{
	locked(ANON);
}
static void locked_memfd(void)
{
	locked(MEMFD);
}

/* ---- all at once ---- */

enum { OWNERS = 3 };

struct crowd {
	struct fill_vm t;
	atomic_bool stop;
	/* of each page: it was given back, and the source's bytes may never be there again */
	_Atomic uint8_t *given;
	unsigned long pushes, reads;
};

/*
 * Pages that are a vCPU's own: what it reads is always what it wrote last, or zeros since it gave
 * the page back.
 */
static void *own(struct vcpu *v)
{
	struct crowd *c = v->opaque;
	struct slot_vm *s = &c->t.s;
	uint64_t seed = v->number + 1;
	vcpu_attach(v);
	for (uint64_t page = v->number; page < s->pages; page += OWNERS) {
		uint64_t gpa = RAM_GPA + page * PAGE, value = page << 8 | v->number;
		uint64_t what = random_number(&seed) % 4;
		if (what == 1)
			EQUAL("a page of the source's", slot_vm_read(s, v, gpa),
			      pattern_word(&s->source.pattern, page, 0));
		if (what == 2) {
			slot_vm_write(s, v, gpa + 24, ~value);
			EQUAL("what was written", slot_vm_read(s, v, gpa + 24), ~value);
		}
		OK(kvmfault_pages_give_back(s->m.library, gpa, PAGE));
		c->given[page] = 1;
		if (what == 3)
			slot_vm_write(s, v, gpa + 8, value);
		EQUAL("a page that was given back", slot_vm_read(s, v, gpa), 0);
		EQUAL("a page that was given back", slot_vm_read(s, v, gpa + 24), 0);
		if (what == 3)
			EQUAL("what was written since", slot_vm_read(s, v, gpa + 8), value);
		/* One from before, once more. */
		uint64_t other = random_number(&seed) % (page / OWNERS + 1) * OWNERS + v->number;
		slot_vm_write(s, v, RAM_GPA + other * PAGE + 16, value);
		EQUAL("what was written", slot_vm_read(s, v, RAM_GPA + other * PAGE + 16), value);
		OK(kvmfault_pages_give_back(s->m.library, RAM_GPA + other * PAGE, PAGE));
		EQUAL("given back again", slot_vm_read(s, v, RAM_GPA + other * PAGE + 16), 0);
	}
	vcpu_detach(v);
	return NULL;
}

static void *push(void *arg)
{
	struct crowd *c = arg;
	struct slot_vm *s = &c->t.s;
	uint64_t seed = 77;
	for (; !c->stop; c->pushes++) {
		uint64_t page = random_number(&seed) % (s->pages - 8);
		int ret = source_install(&s->source, s->m.library, RAM_GPA + page * PAGE, 8 * PAGE);
		CHECK(ret == 0 || ret == -EEXIST, "%d: %s", ret, kvmfault_last_error());
		OK(kvmfault_pages_withdraw(s->m.library, RAM_GPA + page * PAGE, 8 * PAGE));
	}
	return NULL;
}

/* A device. */
static void *look(void *arg)
{
	struct crowd *c = arg;
	struct slot_vm *s = &c->t.s;
	uint64_t seed = 99;
	while (!c->stop) {
		uint64_t page = random_number(&seed) % s->pages;
		if (!c->given[page])
			continue;
		EQUAL("a word that the guest never writes", *(volatile uint64_t *)(s->ram.hva + page * PAGE + 40), 0);
		c->reads++;
	}
	return NULL;
}

static void crowd(enum backing backing)
{
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct crowd c = { .stop = false };
	pthread_t pusher, device;
	unsigned fills = 0;
	fill_vm_create(&c.t, backing, PAGES * PAGE);
	struct slot_vm *s = &c.t.s;
	options.batch = 16;
	options.flags = KVMFAULT_FILL_KEEP_ARMED;
	for (int n = 0; n < OWNERS; n++)
		machine_add_vcpu(&s->m, n % 2 ? 0 : 3);
	for (unsigned round = 0; round < SCALED(4, 1); round++) {
		if (round)
			OK(kvmfault_pages_discard(s->m.library, RAM_GPA, s->ram.len));
		c.given = calloc(s->pages, 1);
		c.stop = false;
		CHECK(!pthread_create(&pusher, NULL, push, &c) && !pthread_create(&device, NULL, look, &c),
		      "pthread_create");
		for (int n = 0; n < OWNERS; n++)
			vcpu_start(s->m.vcpu[n], own, &c);
		options.bytes_per_second = round % 2 ? 2 << 20 : 0;
		struct kvmfault_fill *fill = fill_vm_start(&c.t, &options);
		OK(kvmfault_fill_wait(fill, 60000));
		kvmfault_fill_free(fill);
		fills++;
		for (int n = 0; n < OWNERS; n++)
			vcpu_join(s->m.vcpu[n]);
		c.stop = true;
		pthread_join(pusher, NULL);
		pthread_join(device, NULL);
		EQUAL("absent pages", kvmfault_pages_absent(s->m.library), 0);
		for (uint64_t page = 0; page < s->pages; page++)
			EQUAL("a word that the guest never writes", ((uint64_t *)s->ram.hva)[page * PAGE / 8 + 5], 0);
		free((void *)c.given);
	}
	struct kvmfault_stats stats = machine_stats(&s->m);
	note("%lu pages given back, %lu found empty, %lu copied, in %u fills, %lu pushes, %lu looks of a device",
	     stats.pages_given_back, stats.pages_empty, stats.pages_copied, fills, c.pushes, c.reads);
	slot_vm_destroy(s);
}

static void crowd_anon(void)
{
	crowd(ANON);
}
static void crowd_memfd(void)
{
	crowd(MEMFD);
}

static const struct test_case cases[] = {
	{ "reread-anon", reread_anon, true },
	{ "reread-memfd", reread_memfd, true },
	{ "reread-shared-anon", reread_shared_anon, true },
	{ "reread-hugetlb", reread_hugetlb, true },
	{ "slow", slow, true },
	{ "filling-anon", filling_anon, true },
	{ "filling-memfd", filling_memfd, true },
	{ "filled-anon", filled_anon, true },
	{ "filled-memfd", filled_memfd, true },
	{ "pending", pending, true },
	{ "resolving", resolving, true },
	{ "locked-anon", locked_anon, true },
	{ "locked-memfd", locked_memfd, true },
	{ "crowd-anon", crowd_anon, true },
	{ "crowd-memfd", crowd_memfd, true },
};
TEST_MAIN(cases)
