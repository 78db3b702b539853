/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Background fill: beside a running guest, within its limits, in trouble, and what memory is when it has ended. */
#define _GNU_SOURCE
#include "scene.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGES SCALED(4096, 1024)

struct trouble {
	struct scene s;
	atomic_ulong calls, pages;  /* of the fill */
	atomic_int answer;          /* to the fill, for pages whose number is 5 modulo 97; 0: they come as the others do */
	atomic_int us;              /* the fill's calls take so long */
	struct kvmfault_vm *vm;
};

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct trouble *t = opaque;
	if (fault->origin != KVMFAULT_ORIGIN_FILL) {
		EQUAL("the window of a fault", fault->window_len, fault->len);
		int ret = source_install(&t->s.source, vm, fault->gpa, fault->len);
		return ret == -EEXIST ? 0 : OK(ret);
	}
	EQUAL("vcpu", fault->vcpu, -1);
	t->calls++;
	t->pages += fault->window_len / PAGE;
	if (t->us)
		usleep(t->us);
	for (uint64_t gpa = fault->window_gpa; t->answer && gpa < fault->window_gpa + fault->window_len; gpa += PAGE)
		if ((gpa - RAM_GPA) / PAGE % 97 == 5)
			return t->answer;
	int ret = source_install(&t->s.source, vm, fault->window_gpa, fault->window_len);
	return ret == -EEXIST || ret == -EBADF ? 0 : OK(ret); /* others may have brought it; or the VM was freed */
}

static void create(struct trouble *t, enum backing backing, uint64_t len)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct scene *s = &t->s;
	memset(t, 0, sizeof(*t));
	ram_create(&s->ram, backing, len);
	s->pages = s->ram.len / PAGE;
	machine_create(&s->m, s->pages * sizeof(uint32_t));
	source_create(&s->source, RAM_GPA, s->ram.len, PATTERN);
	s->list = machine_share(&s->m, s->pages * sizeof(uint32_t), &s->list_gpa);
	list_sequential(s->list, s->pages);
	options.resolver = resolve;
	options.opaque = t;
	machine_attach(&s->m, &s->source, &options);
	machine_set_slot(&s->m, &s->ram, RAM_SLOT, RAM_GPA);
}

static struct kvmfault_fill *start(struct trouble *t, const struct kvmfault_fill_options *options)
{
	struct kvmfault_fill_options usual = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	OK(kvmfault_fill_start(t->s.m.library, options ? options : &usual, &fill));
	return fill;
}

static void fill_all(struct trouble *t, const struct kvmfault_fill_options *options)
{
	struct kvmfault_fill *fill = start(t, options);
	OK(kvmfault_fill_wait(fill, 60000));
	OK(kvmfault_fill_wait(fill, 0));
	kvmfault_fill_free(fill);
	EQUAL("absent pages", kvmfault_pages_absent(t->s.m.library), 0);
}

/* ---- what it brings ---- */

static void whole(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct trouble t;
		struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
		create(&t, backing, PAGES * PAGE);
		options.batch = 32;
		fill_all(&t, &options);
		EQUAL("calls", t.calls, PAGES / 32);
		pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, PAGES);
		struct vcpu *v = scene_add_vcpu(&t.s, 3);
		scene_visit(&t.s, v, 0, PAGES, READ_FIRST);
		EQUAL("faults", machine_stats(&t.s.m).outcome_resolved, 0);
		vcpu_detach(v);
		scene_destroy(&t.s);
	}
}

static void huge(void)
{
	struct trouble t;
	create(&t, HUGETLB, 8 * HUGE_PAGE);
	fill_all(&t, NULL);
	pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, t.s.pages);
	struct vcpu *v = scene_add_vcpu(&t.s, 3);
	scene_visit(&t.s, v, 0, t.s.pages, WRITE_FIRST);
	vcpu_detach(v);
	scene_destroy(&t.s);
}

/* The guest runs meanwhile, in another order, and writes: every page comes once, and what was written stays. */
static void beside_the_guest(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct trouble t;
		struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
		create(&t, backing, PAGES * PAGE);
		list_shuffle(t.s.list, PAGES, 11);
		options.threads = 2;
		options.bytes_per_second = 64 << 20;
		struct kvmfault_fill *fill = start(&t, &options);
		struct vcpu *v[4];
		for (int i = 0; i < 4; i++) {
			v[i] = machine_add_vcpu(&t.s.m, i % 2 ? 0 : 3);
			scene_start_visit(&t.s, v[i], i * PAGES / 4, PAGES / 4, i < 2 ? READ_FIRST : WRITE_FIRST);
		}
		for (int i = 0; i < 4; i++)
			vcpu_join(v[i]);
		OK(kvmfault_fill_wait(fill, 60000));
		kvmfault_fill_free(fill);
		struct kvmfault_stats stats = machine_settled_stats(&t.s.m);
		EQUAL("pages that came", stats.pages_copied, PAGES);
		for (uint32_t n = 0; n < PAGES; n++) {
			uint32_t page = t.s.list[n];
			uint64_t last = pattern_word(&t.s.source.pattern, page, PAGE / 8 - 1);
			EQUAL("the last word of a page", *(uint64_t *)(t.s.ram.hva + (page + 1) * PAGE - 8), n < PAGES / 2 ? last : ~last);
		}
		note("%lu pages by the guest's faults, %lu calls of the fill", (unsigned long)stats.outcome_resolved, (unsigned long)t.calls);
		scene_destroy(&t.s);
	}
}

/* What follows a fault of the guest's comes before what is at the beginning. */
static void near_faults_first(void)
{
	struct trouble t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	create(&t, MEMFD, PAGES * PAGE);
	struct vcpu *v = scene_add_vcpu(&t.s, 3);
	options.bytes_per_second = 2 << 20;
	options.batch = 16;
	scene_visit(&t.s, v, PAGES / 2, 1, READ_FIRST);
	struct kvmfault_fill *fill = start(&t, &options);
	UNTIL(kvmfault_pages_absent(t.s.m.library) < (int64_t)PAGES - 100);
	OK(kvmfault_fill_stop(fill));
	EQUAL("a page behind the fault", kvmfault_pages_state(t.s.m.library, RAM_GPA + (PAGES / 2 + 80) * PAGE), KVMFAULT_PAGE_PRESENT);
	EQUAL("the first page", kvmfault_pages_state(t.s.m.library, RAM_GPA), KVMFAULT_PAGE_ABSENT);
	REFUSED(kvmfault_fill_wait(fill, 10000), ECANCELED, "stopped");
	kvmfault_fill_free(fill);
	vcpu_detach(v);
	scene_destroy(&t.s);
}

/* A limit holds for all threads together. */
static void limited(void)
{
	struct trouble t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	create(&t, MEMFD, 8 << 20);
	options.threads = 4;
	options.bytes_per_second = 16 << 20;
	double begin = now();
	fill_all(&t, &options);
	double seconds = now() - begin;
	CHECK(seconds > 0.45, "8 MiB in %.2f s, at 16 MiB/s", seconds);
	note("8 MiB in %.2f s, at 16 MiB/s", seconds);
	scene_destroy(&t.s);
}

/* ---- the end ---- */

/* Memory is the VMM's own again: nobody is asked for what it drops. And when it turns the fast path on again, all is as before. */
static void ordinary(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct trouble t;
		create(&t, backing, PAGES * PAGE);
		struct vcpu *v = scene_add_vcpu(&t.s, 3);
		scene_visit(&t.s, v, 0, 100, WRITE_FIRST);
		fill_all(&t, NULL);
		struct kvmfault_stats before = machine_settled_stats(&t.s.m);
		REFUSED(kvmfault_pages_discard(t.s.m.library, RAM_GPA, PAGE), EBUSY, "set_fast_only");
		for (int i = 0; i < 2; i++)
			SYS(madvise(t.s.ram.hva + (200 + i) * PAGE, PAGE, backing == ANON ? MADV_DONTNEED : MADV_REMOVE));
		EQUAL("what the guest reads of a page that was dropped", scene_read(&t.s, v, RAM_GPA + 200 * PAGE), 0);
		EQUAL("what the host reads of one", *(volatile uint64_t *)(t.s.ram.hva + 201 * PAGE), 0);
		scene_write(&t.s, v, RAM_GPA + 200 * PAGE + 8, 77);
		EQUAL("what the guest wrote there", *(volatile uint64_t *)(t.s.ram.hva + 200 * PAGE + 8), 77);
		scene_visit(&t.s, v, 300, PAGES - 300, READ_FIRST);
		struct kvmfault_stats after = machine_stats(&t.s.m);
		EQUAL("faults since", after.faults_vcpu + after.faults_host - before.faults_vcpu - before.faults_host, 0);

		OK(kvmfault_memslot_set_fast_only(t.s.m.library, RAM_SLOT, 1));
		OK(kvmfault_pages_discard(t.s.m.library, RAM_GPA + 500 * PAGE, 32 * PAGE));
		EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), 32);
		scene_visit(&t.s, v, 500, 32, READ_FIRST);
		EQUAL("faults", machine_settled_stats(&t.s.m).outcome_resolved - after.outcome_resolved, 32);
		fill_all(&t, NULL);
		vcpu_detach(v);
		scene_destroy(&t.s);
	}
}

/* With KVMFAULT_FILL_KEEP_ARMED nothing changes: a balloon goes on to work. */
static void kept_armed(void)
{
	struct trouble t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	create(&t, MEMFD, PAGES * PAGE);
	struct vcpu *v = scene_add_vcpu(&t.s, 3);
	options.flags = KVMFAULT_FILL_KEEP_ARMED;
	fill_all(&t, &options);
	OK(kvmfault_pages_discard(t.s.m.library, RAM_GPA + 500 * PAGE, 32 * PAGE));
	scene_visit(&t.s, v, 500, 32, READ_FIRST);
	EQUAL("faults", machine_settled_stats(&t.s.m).outcome_resolved, 32);
	vcpu_detach(v);
	scene_destroy(&t.s);
}

/* A slot that is deleted and set anew on memory that a fill has completed: a VMM changes its memory map at any time. */
static void slots_afterwards(void)
{
	struct trouble t;
	create(&t, MEMFD, PAGES * PAGE);
	struct vcpu *v = scene_add_vcpu(&t.s, 3);
	fill_all(&t, NULL);
	struct kvmfault_memslot slot = slot_on(&t.s.ram, RAM_SLOT, RAM_GPA), gone = slot;
	gone.len = 0;
	gone.flags = KVMFAULT_MEMSLOT_KEEP;
	OK(kvmfault_memslot_set(t.s.m.library, &gone));
	OK(kvmfault_memslot_set(t.s.m.library, &slot));
	scene_visit(&t.s, v, 0, PAGES, WRITE_FIRST);
	EQUAL("faults", machine_stats(&t.s.m).faults_vcpu, 0);
	REFUSED(kvmfault_pages_discard(t.s.m.library, RAM_GPA, PAGE), EBUSY, "fast path");
	OK(kvmfault_memslot_set_fast_only(t.s.m.library, RAM_SLOT, 1));
	OK(kvmfault_pages_discard(t.s.m.library, RAM_GPA, 8 * PAGE));
	scene_visit(&t.s, v, 0, 8, READ_FIRST);
	EQUAL("faults", machine_settled_stats(&t.s.m).outcome_resolved, 8);
	vcpu_detach(v);
	scene_destroy(&t.s);
}

static uint64_t huge_kib(const void *address)
{
	char line[256];
	uint64_t start, end, total = 0, kib;
	bool inside = false;
	FILE *file = fopen("/proc/self/smaps", "r");
	CHECK(file, "smaps");
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			inside = start <= (uint64_t)address && (uint64_t)address < end;
		else if (inside && (sscanf(line, "AnonHugePages: %lu", &kib) == 1 || sscanf(line, "ShmemPmdMapped: %lu", &kib) == 1))
			total += kib;
	}
	fclose(file);
	return total;
}

/* The guest reads all of its memory: the time of the fastest of some rounds. */
static double reading(struct scene *s, struct vcpu *v)
{
	double best = 1e9;
	for (unsigned long round = 0; round < SCALED(10, 3); round++) {
		double begin = now();
		scene_visit(s, v, 0, s->pages, READ_FIRST);
		best = now() - begin < best ? now() - begin : best;
	}
	return best;
}

/* Can memory like this be collapsed here at all? */
static bool can_collapse(enum backing backing)
{
	struct ram ram;
	ram_create(&ram, backing, 4 * HUGE_PAGE);
	madvise(ram.hva, ram.len, MADV_HUGEPAGE);
	memset(ram.hva, 1, ram.len);
	bool can = madvise((void *)(((uintptr_t)ram.hva + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE), HUGE_PAGE, 25 /* MADV_COLLAPSE */) == 0;
	ram_destroy(&ram);
	return can;
}

/* The guest then runs as fast as with memory that the library has never seen, in huge pages where there are some to be had. */
static void full_speed(void)
{
	char figures[256] = "";
	const uint64_t len = SCALED(16, 8) << 20;
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct trouble t;
		struct scene plain;
		create(&t, backing, len);
		madvise(t.s.ram.hva, t.s.ram.len, MADV_HUGEPAGE);
		struct vcpu *v = scene_add_vcpu(&t.s, 3);
		scene_visit(&t.s, v, 0, t.s.pages / 2, READ_FIRST);
		fill_all(&t, NULL);

		scene_attach(&plain, backing, len, test_mechanism(), NULL);
		struct kvm_userspace_memory_region region = {
			.slot = RAM_SLOT, .guest_phys_addr = RAM_GPA, .memory_size = plain.ram.len, .userspace_addr = (uintptr_t)plain.ram.hva,
		};
		SYS(ioctl(plain.m.vm, KVM_SET_USER_MEMORY_REGION, &region));
		for (uint64_t page = 0; page < plain.pages; page++)
			pattern_fill(&plain.source.pattern, page, plain.ram.hva + page * PAGE);
		struct vcpu *w = scene_add_vcpu(&plain, 3);

		double filled = 1e9, never = 1e9;
		for (int round = 0; round < 2 || (round < 10 && filled / never > 1.1); round++) {
			double one = reading(&t.s, v), other = reading(&plain, w);
			filled = one < filled ? one : filled;
			never = other < never ? other : never;
		}
		pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, t.s.pages);
		uint64_t huge = huge_kib(t.s.ram.hva), all = t.s.ram.len / 1024;
		size_t length = strlen(figures);
		snprintf(figures + length, sizeof(figures) - length, "%s%s: %.2f times as long, %lu of %lu KiB in huge pages", *figures ? "; " : "",
			 backing_name(backing), filled / never, huge, all);
		CHECK(filled / never < 1.25, "%s", figures);
		CHECK(huge >= all / 2 || !can_collapse(backing), "%s", figures);
		vcpu_detach(v);
		vcpu_detach(w);
		scene_destroy(&t.s);
		scene_destroy(&plain);
	}
	note("%s", figures);
}

/* ---- trouble ---- */

/* Stopped half-way and started again, several times: nothing is lost, and nothing comes twice. */
static void stopped(void)
{
	struct trouble t;
	create(&t, MEMFD, PAGES * PAGE);
	t.us = 500;
	for (int round = 0; round < 4; round++) {
		int64_t before = kvmfault_pages_absent(t.s.m.library);
		struct kvmfault_fill *fill = start(&t, NULL);
		REFUSED(kvmfault_fill_wait(fill, 1), ETIMEDOUT, "absent");
		UNTIL(kvmfault_pages_absent(t.s.m.library) < before);
		OK(kvmfault_fill_stop(fill));
		REFUSED(kvmfault_fill_wait(fill, -1), ECANCELED, "stopped");
		if (round % 2 == 0)
			OK(kvmfault_fill_stop(fill));
		kvmfault_fill_free(fill);
		REFUSED(kvmfault_fill_wait(fill, 0), EBADF, "freed");
	}
	CHECK(kvmfault_pages_absent(t.s.m.library) > 0, "the fill was over before it was stopped");
	t.us = 0;
	fill_all(&t, NULL);
	pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, PAGES);
	EQUAL("pages that came", machine_stats(&t.s.m).pages_copied, PAGES);
	scene_destroy(&t.s);
}

static atomic_uint finalized;

static void finalizer(void *opaque)
{
	(void)opaque;
	finalized++;
}

/* Its handle is freed while it is at it, or the whole VM: the threads go when their call is over, and the finalizer is called once. */
static void freed(void)
{
	for (int what = 0; what < 2; what++) {
		struct trouble t;
		struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
		create(&t, MEMFD, PAGES * PAGE);
		t.us = 20000;
		finalized = 0;
		options.threads = 3;
		options.finalizer = finalizer;
		struct kvmfault_fill *fill = start(&t, &options);
		UNTIL(t.calls >= 3);
		EQUAL("calls of the finalizer", finalized, 0);
		if (what == 0) {
			kvmfault_fill_free(fill);
		} else {
			kvmfault_vm_free(t.s.m.library);
			REFUSED(kvmfault_fill_wait(fill, 10000), ESHUTDOWN, "freed");
			kvmfault_fill_free(fill);
		}
		UNTIL(finalized == 1);
		if (what == 0) {
			t.us = 0;
			/* The old one may still be bringing its last pages: then this is refused. */
			struct kvmfault_fill_options usual = KVMFAULT_FILL_OPTIONS_INIT;
			OK(kvmfault_fill_start(t.s.m.library, &usual, &fill));
			OK(kvmfault_fill_wait(fill, 60000));
			kvmfault_fill_free(fill);
			pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, PAGES);
			scene_destroy(&t.s);
		}
	}
}

/* Pages that the resolver fails for: the others come, the fill ends with the resolver's error, and later it works. */
static void failing(void)
{
	struct trouble t;
	uint64_t bad = 0;
	create(&t, MEMFD, PAGES * PAGE);
	struct vcpu *v = scene_add_vcpu(&t.s, 3);
	for (uint64_t page = 0; page < PAGES; page++)
		bad += page % 97 == 5;
	t.answer = -EREMOTEIO;
	struct kvmfault_fill *fill = start(&t, NULL);
	struct kvmfault_fill_progress progress = KVMFAULT_FILL_PROGRESS_INIT;
	REFUSED(kvmfault_fill_wait(fill, 60000), EREMOTEIO, "could not be brought");
	OK(kvmfault_fill_status(fill, &progress));
	EQUAL("ended", progress.ended, 1);
	EQUAL("pages left", progress.pages_left, bad);
	CHECK(progress.failures >= bad, "%lu failures", progress.failures);
	EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), bad);
	kvmfault_fill_free(fill);
	scene_visit(&t.s, v, 0, PAGES / 2, READ_FIRST); /* a fault of the guest's own is another matter */
	t.answer = 0;
	fill_all(&t, NULL);
	scene_visit(&t.s, v, 0, PAGES, READ_FIRST);
	vcpu_detach(v);
	scene_destroy(&t.s);
}

/* A resolver that is dead: that is found out before all of a large memory was tried. */
static int dead(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)vm, (void)fault;
	++*(atomic_ulong *)opaque;
	return -ECONNRESET;
}

static void dead_resolver(void)
{
	struct machine m;
	struct ram ram;
	atomic_ulong calls = 0;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	ram_create(&ram, MEMFD, 1ul << 30);
	machine_create(&m, PAGE);
	options.resolver = dead;
	options.opaque = &calls;
	options.mechanism = KVMFAULT_MECHANISM_USERFAULTFD;
	machine_attach(&m, NULL, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	fill_options.threads = 4;
	OK(kvmfault_fill_start(m.library, &fill_options, &fill));
	REFUSED(kvmfault_fill_wait(fill, 30000), ECONNRESET, "could not be brought");
	kvmfault_fill_free(fill);
	CHECK(calls < 3000, "%lu calls", calls);
	EQUAL("absent pages", kvmfault_pages_absent(m.library), ram.len / PAGE);
	machine_destroy(&m);
	ram_destroy(&ram);
}

/* A resolver that wants to be asked again, for a while. */
static void again(void)
{
	struct trouble t;
	create(&t, MEMFD, PAGES * PAGE);
	t.answer = KVMFAULT_RETRY;
	struct kvmfault_fill *fill = start(&t, NULL);
	REFUSED(kvmfault_fill_wait(fill, 500), ETIMEDOUT, "absent");
	t.answer = 0;
	OK(kvmfault_fill_wait(fill, 60000));
	kvmfault_fill_free(fill);
	pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, PAGES);
	scene_destroy(&t.s);
}

/* Memory with lost pages stays armed: they can be had later. */
static void lost(void)
{
	struct trouble t;
	uint64_t bad = 0;
	create(&t, MEMFD, PAGES * PAGE);
	struct vcpu *v = scene_add_vcpu(&t.s, 3);
	t.answer = KVMFAULT_LOST;
	fill_all(&t, NULL);
	for (uint64_t page = 0; page < PAGES; page++)
		bad += kvmfault_pages_state(t.s.m.library, RAM_GPA + page * PAGE) == KVMFAULT_PAGE_LOST;
	CHECK(bad > 0, "no page is lost");
	t.answer = 0;
	OK(kvmfault_pages_discard(t.s.m.library, RAM_GPA, PAGES * PAGE));
	fill_all(&t, NULL);
	scene_visit(&t.s, v, 0, PAGES, READ_FIRST);
	vcpu_detach(v);
	scene_destroy(&t.s);
}

/* A resolver that only asks for the pages, as a post-copy destination does: they come from another thread. */
static void pending(void)
{
	struct machine m;
	struct ram ram;
	struct source source;
	struct later later;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	ram_create(&ram, MEMFD, 1024 * PAGE);
	machine_create(&m, PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	later_create(&later, &source, 1, 200);
	options.resolver = later_resolve;
	options.opaque = &later;
	machine_attach(&m, &source, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	fill_options.threads = 2;
	fill_options.batch = 1;
	OK(kvmfault_fill_start(m.library, &fill_options, &fill));
	OK(kvmfault_fill_wait(fill, 60000));
	kvmfault_fill_free(fill);
	later_stop(&later);
	EQUAL("calls", source.total, 1024);
	pattern_check(&source.pattern, ram.hva, 0, 1024);
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
}

/* Pages become absent again while it is at it: it brings those too. */
static void discarded_meanwhile(void)
{
	struct trouble t;
	uint64_t seed = 3;
	create(&t, MEMFD, PAGES * PAGE);
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	options.threads = 2;
	for (unsigned round = 0; round < scaled(20); round++) {
		struct kvmfault_fill *fill = start(&t, &options);
		int ret = 0;
		for (int i = 0; i < 200 && ret != -EBUSY; i++) {
			ret = kvmfault_pages_discard(t.s.m.library, RAM_GPA + random_number(&seed) % PAGES * PAGE, PAGE);
			CHECK(ret == 0 || ret == -EBUSY, "%d: %s", ret, kvmfault_last_error());
		}
		OK(kvmfault_fill_wait(fill, 60000));
		kvmfault_fill_free(fill);
		EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), 0);
		pattern_check(&t.s.source.pattern, t.s.ram.hva, 0, PAGES);
		OK(kvmfault_memslot_set_fast_only(t.s.m.library, RAM_SLOT, 1));
		OK(kvmfault_pages_discard(t.s.m.library, RAM_GPA, PAGES * PAGE));
	}
	scene_destroy(&t.s);
}

/* ---- what the VMM is told, and what it may do ---- */

struct reports {
	struct kvmfault_fill *fill;
	struct kvmfault_vm *vm;
	atomic_uint count, ended;
	uint64_t left;
	int wait, start, stop, state;
	struct kvmfault_fill_progress last;
};

static void report(void *opaque, const struct kvmfault_fill_progress *progress)
{
	struct reports *r = opaque;
	EQUAL("size", progress->size, sizeof(*progress));
	EQUAL("pages in all", progress->pages_total, PAGES);
	CHECK(progress->pages_left <= r->left, "%lu pages left, %lu before", progress->pages_left, r->left);
	EQUAL("reports after the end", r->ended, 0);
	r->left = progress->pages_left;
	r->last = *progress;
	r->ended = progress->ended;
	r->count++;
	if (r->count == 1) {
		struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
		struct kvmfault_fill *other;
		r->wait = kvmfault_fill_wait(r->fill, 0);
		r->start = kvmfault_fill_start(r->vm, &options, &other);
		r->state = kvmfault_pages_state(r->vm, RAM_GPA);
	}
}

static void progress(void)
{
	struct trouble t;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct reports reports = { .left = PAGES };
	create(&t, MEMFD, PAGES * PAGE);
	options.progress = report;
	options.opaque = &reports;
	options.interval_ms = 20;
	options.bytes_per_second = 32 << 20;
	reports.vm = t.s.m.library;
	reports.fill = start(&t, &options);
	OK(kvmfault_fill_wait(reports.fill, 60000));
	UNTIL(reports.ended);
	CHECK(reports.count >= 5 && reports.count < 500, "%u reports", reports.count);
	EQUAL("pages left", reports.last.pages_left, 0);
	EQUAL("working set done", reports.last.working_set_done, 1);
	EQUAL("wait in the callback", reports.wait, -EDEADLK);
	EQUAL("start in the callback", reports.start, -EDEADLK);
	EQUAL("state in the callback", reports.state, KVMFAULT_PAGE_PRESENT);
	struct kvmfault_fill_progress status = KVMFAULT_FILL_PROGRESS_INIT;
	OK(kvmfault_fill_status(reports.fill, &status));
	EQUAL("ended", status.ended, 1);
	kvmfault_fill_free(reports.fill);
	scene_destroy(&t.s);
}

static void wrong_arguments(void)
{
	struct trouble t;
	struct kvmfault_fill *fill = (void *)1;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	create(&t, MEMFD, PAGES * PAGE);
	finalized = 0;
#define WRONG(field, value, error, words)                                                \
	do {                                                                             \
		struct kvmfault_fill_options wrong = KVMFAULT_FILL_OPTIONS_INIT;         \
		wrong.finalizer = finalizer;                                             \
		wrong.field = value;                                                     \
		REFUSED(kvmfault_fill_start(t.s.m.library, &wrong, &fill), error, words); \
		CHECK(!fill, "a handle after an error");                                 \
	} while (0)
	WRONG(size, 0, EINVAL, "options.size");
	WRONG(threads, 65, EINVAL, "threads");
	WRONG(threads, UINT32_MAX, EINVAL, "threads");
	WRONG(batch, 4097, EINVAL, "batch");
	WRONG(flags, 8, EINVAL, "flags");
	WRONG(flags, KVMFAULT_FILL_WORKING_SET_ONLY, EINVAL, "working_set_fd");
	WRONG(reserved, 1, EINVAL, "reserved");
	WRONG(working_set_fd, -2, EBADF, "working_set_fd");
	REFUSED(kvmfault_fill_start(t.s.m.library, NULL, &fill), EINVAL, "options");
	REFUSED(kvmfault_fill_start(t.s.m.library, &options, NULL), EINVAL, "fill");
	EQUAL("calls of the finalizer", finalized, 0);
	EQUAL("absent pages", kvmfault_pages_absent(t.s.m.library), PAGES);

	t.us = 1000;
	struct kvmfault_fill *one = start(&t, NULL);
	REFUSED(kvmfault_fill_start(t.s.m.library, &options, &fill), EBUSY, "under way");
	kvmfault_fill_free(one);
	scene_destroy(&t.s);
}

static const struct test_case cases[] = {
	{ "whole", whole, true },
	{ "huge", huge, true },
	{ "beside-the-guest", beside_the_guest, true },
	{ "near-faults-first", near_faults_first, true },
	{ "limited", limited, false },
	{ "ordinary", ordinary, true },
	{ "kept-armed", kept_armed, true },
	{ "slots-afterwards", slots_afterwards, true },
	{ "full-speed", full_speed, true },
	{ "stopped", stopped, false },
	{ "freed", freed, false },
	{ "failing", failing, true },
	{ "dead-resolver", dead_resolver, false },
	{ "again", again, false },
	{ "lost", lost, true },
	{ "pending", pending, true },
	{ "discarded-meanwhile", discarded_meanwhile, true },
	{ "progress", progress, false },
	{ "wrong-arguments", wrong_arguments, false },
};
TEST_MAIN(cases)
