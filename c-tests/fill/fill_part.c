/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A fill of a part of memory: what it installs, and that it leaves the rest alone. */
#define _GNU_SOURCE
#include "fill_vm.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LOW_SLOT = 2, HIGH_SLOT, FEW = 1024, GAP = 512, BATCH = 16 };
#define LOW_GPA RAM_GPA
#define HIGH_GPA (RAM_GPA + (FEW + GAP) * PAGE) /* behind a hole */

/*
 * Two slots with a hole between them; memory in the order opposite to that of the guest's
 * addresses, and not adjacent.
 */
struct parts {
	struct machine m;
	struct ram ram;
	struct source source;
	uint64_t from, to; /* calls of a fill are for this */
	atomic_ulong calls;
};

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct parts *p = opaque;
	if (fault->origin == KVMFAULT_ORIGIN_FILL) {
		CHECK(fault->window_gpa >= p->from && fault->window_gpa + fault->window_len <= p->to,
		      "a window [%#lx, +%#lx) outside [%#lx, %#lx)", (unsigned long)fault->window_gpa,
		      (unsigned long)fault->window_len, (unsigned long)p->from, (unsigned long)p->to);
		p->calls++;
	}
	int ret = source_install(&p->source, vm, fault->window_gpa, fault->window_len);
	return ret == -EEXIST ? 0 : OK(ret);
}

static void set_slot(struct parts *p, uint32_t number, uint64_t gpa, uint64_t at)
{
	struct kvmfault_memslot slot = slot_on(&p->ram, number, gpa);
	slot.hva = p->ram.hva + at;
	slot.len = FEW * PAGE;
	OK(kvmfault_memslot_set(p->m.library, &slot));
}

static void create(struct parts *p, enum backing backing, uint32_t readahead)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	memset(p, 0, sizeof(*p));
	ram_create(&p->ram, backing, 3 * FEW * PAGE);
	machine_create(&p->m, PAGE);
	source_create(&p->source, LOW_GPA, HIGH_GPA + FEW * PAGE - LOW_GPA, PATTERN);
	options.resolver = resolve;
	options.opaque = p;
	options.readahead = readahead;
	machine_attach(&p->m, &p->source, &options);
	set_slot(p, LOW_SLOT, LOW_GPA, 2 * FEW * PAGE);
	set_slot(p, HIGH_SLOT, HIGH_GPA, 0);
}

static void destroy(struct parts *p)
{
	machine_destroy(&p->m);
	ram_destroy(&p->ram);
	source_destroy(&p->source);
}

/*
 * Fills [from, to), and checks each page of both slots: present if it lies inside or is one of
 * [touched, touched_end), absent if not.
 */
static void fill_part(struct parts *p, uint64_t from, uint64_t to, struct kvmfault_fill_options options,
		      uint64_t touched, uint64_t touched_end)
{
	struct kvmfault_fill *fill;
	struct kvmfault_fill_progress progress = KVMFAULT_FILL_PROGRESS_INIT;
	uint64_t absent = kvmfault_pages_absent(p->m.library), inside = 0;
	for (uint64_t gpa = from; gpa < to; gpa += PAGE)
		inside += kvmfault_pages_state(p->m.library, gpa) == KVMFAULT_PAGE_ABSENT;
	p->from = options.gpa = from;
	p->to = to;
	options.len = to - from;
	options.batch = BATCH;
	OK(kvmfault_fill_start(p->m.library, &options, &fill));
	OK(kvmfault_fill_wait(fill, 60000));
	OK(kvmfault_fill_status(fill, &progress));
	EQUAL("pages in all", progress.pages_total, inside);
	EQUAL("pages left", progress.pages_left, 0);
	EQUAL("ended", progress.ended, 1);
	EQUAL("failures", progress.failures, 0);
	kvmfault_fill_free(fill);
	EQUAL("absent pages", kvmfault_pages_absent(p->m.library), absent - inside);
	for (uint64_t n = 0; n < FEW; n++) {
		uint64_t gpas[] = { LOW_GPA + n * PAGE, HIGH_GPA + n * PAGE };
		for (int i = 0; i < 2; i++) {
			bool there = (from <= gpas[i] && gpas[i] < to) || (touched <= gpas[i] && gpas[i] < touched_end);
			int state = kvmfault_pages_state(p->m.library, gpas[i]);
			CHECK(state == (there ? KVMFAULT_PAGE_PRESENT : KVMFAULT_PAGE_ABSENT),
			      "page %lu of slot %d is in state %d", n, i, state);
			if (there)
				pattern_check(&p->source.pattern, p->ram.hva + (i ? n : 2 * FEW + n) * PAGE,
					      (gpas[i] - LOW_GPA) / PAGE, 1);
		}
	}
	/* Memory stays armed, whatever it was that came. */
	OK(kvmfault_pages_discard(p->m.library, LOW_GPA + FEW / 2 * PAGE, PAGE));
	OK(kvmfault_pages_discard(p->m.library, HIGH_GPA, FEW * PAGE));
}

#define USUAL ((struct kvmfault_fill_options)KVMFAULT_FILL_OPTIONS_INIT)

/* A part of a slot, whose ends are no multiple of the batch; then all of it. */
static void slot(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct parts p;
		create(&p, backing, 0);
		fill_part(&p, LOW_GPA + 101 * PAGE, LOW_GPA + 603 * PAGE, USUAL, 0, 0);
		OK(kvmfault_pages_discard(p.m.library, LOW_GPA, FEW * PAGE));
		fill_part(&p, LOW_GPA, LOW_GPA + FEW * PAGE, USUAL, 0, 0);
		/* A fill skips pages that are present already. */
		OK(kvmfault_pages_resolve(p.m.library, LOW_GPA, FEW * PAGE));
		p.calls = 0;
		fill_part(&p, LOW_GPA, LOW_GPA + FEW * PAGE, USUAL, 0, 0);
		EQUAL("calls for nothing", p.calls, 0);
		destroy(&p);
	}
}

/*
 * The end of one slot, the hole, and the beginning of another; then more than there is. A fill
 * without a range then makes all of it ordinary.
 */
static void across(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct parts p;
		struct kvmfault_fill *fill;
		struct kvmfault_fill_options options = USUAL;
		create(&p, backing, 0);
		options.threads = 3;
		fill_part(&p, LOW_GPA + 1000 * PAGE, HIGH_GPA + 7 * PAGE, options, 0, 0);
		fill_part(&p, LOW_GPA - 3 * PAGE, HIGH_GPA + 2 * FEW * PAGE, options, 0, 0);
		OK(kvmfault_fill_start(p.m.library, &USUAL, &fill));
		OK(kvmfault_fill_wait(fill, 60000));
		kvmfault_fill_free(fill);
		REFUSED(kvmfault_pages_discard(p.m.library, LOW_GPA, PAGE), EBUSY, "set_fast_only");
		destroy(&p);
	}
}

/* What follows the guest's latest faults comes first, but for what is outside. */
static void beside_faults(void)
{
	struct parts p;
	struct step *steps;
	uint64_t gpa, touched = LOW_GPA + 500 * PAGE;
	create(&p, MEMFD, 0);
	struct vcpu *v = machine_add_vcpu(&p.m, 3);
	steps = machine_share(&p.m, PAGE, &gpa);
	steps[0] = (struct step){ READ64, touched, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_attach(v);
	vcpu_load_script(v, gpa);
	vcpu_run(v);
	EQUAL("word", steps[0].value, pattern_word(&p.source.pattern, 500, 0));
	machine_settled_stats(&p.m);
	fill_part(&p, HIGH_GPA + 3 * PAGE, HIGH_GPA + 100 * PAGE, USUAL, touched, touched + PAGE);
	fill_part(&p, LOW_GPA + 495 * PAGE, LOW_GPA + 505 * PAGE, USUAL, touched, touched + PAGE);
	vcpu_detach(v);
	destroy(&p);
}

/* Of a working set only what is inside comes; and with _WORKING_SET_ONLY nothing else does. */
static void working_set(void)
{
	struct parts p;
	struct kvmfault_fill *fill;
	struct kvmfault_fill_options options = USUAL;
	struct kvmfault_fill_progress progress = KVMFAULT_FILL_PROGRESS_INIT;
	create(&p, MEMFD, 0);
	options.working_set_fd = SYS(memfd_create("working-set", MFD_CLOEXEC));
	OK(kvmfault_working_set_record(p.m.library, 1));
	OK(kvmfault_pages_resolve(p.m.library, LOW_GPA + 90 * PAGE, 20 * PAGE));
	OK(kvmfault_pages_resolve(p.m.library, HIGH_GPA, 20 * PAGE));
	OK(kvmfault_working_set_save(p.m.library, options.working_set_fd));
	OK(kvmfault_working_set_record(p.m.library, 0));
	OK(kvmfault_pages_discard(p.m.library, LOW_GPA, FEW * PAGE));
	OK(kvmfault_pages_discard(p.m.library, HIGH_GPA, FEW * PAGE));

	p.from = options.gpa = LOW_GPA + 100 * PAGE;
	options.len = 50 * PAGE;
	p.to = p.from + options.len;
	options.flags = KVMFAULT_FILL_WORKING_SET_ONLY;
	OK(kvmfault_fill_start(p.m.library, &options, &fill));
	OK(kvmfault_fill_wait(fill, 60000));
	OK(kvmfault_fill_wait_working_set(fill, 0));
	OK(kvmfault_fill_status(fill, &progress));
	EQUAL("pages in all", progress.pages_total, 50);
	EQUAL("pages left", progress.pages_left, 40);
	kvmfault_fill_free(fill);
	EQUAL("absent pages", kvmfault_pages_absent(p.m.library), 2 * FEW - 10);
	options.flags = 0;
	fill_part(&p, p.from, p.to, options, 0, 0);
	close(options.working_set_fd);
	destroy(&p);
}

/* Memory that two slots show is filled once. */
static void shown_twice(void)
{
	struct parts p;
	create(&p, MEMFD, 0);
	struct kvmfault_memslot gone = KVMFAULT_MEMSLOT_INIT;
	gone.slot = HIGH_SLOT;
	OK(kvmfault_memslot_set(p.m.library, &gone));
	set_slot(&p, HIGH_SLOT, HIGH_GPA, 2 * FEW * PAGE);
	struct kvmfault_fill_options options = USUAL;
	struct kvmfault_fill_progress progress = KVMFAULT_FILL_PROGRESS_INIT;
	struct kvmfault_fill *fill;
	p.from = options.gpa = LOW_GPA;
	options.len = HIGH_GPA + FEW * PAGE - LOW_GPA;
	p.to = p.from + options.len;
	OK(kvmfault_fill_start(p.m.library, &options, &fill));
	OK(kvmfault_fill_wait(fill, 60000));
	OK(kvmfault_fill_status(fill, &progress));
	EQUAL("pages in all", progress.pages_total, FEW);
	EQUAL("pages left", progress.pages_left, 0);
	kvmfault_fill_free(fill);
	EQUAL("absent pages", kvmfault_pages_absent(p.m.library), 0);
	destroy(&p);
}

/* Huge pages come as a whole: a range ends between two of them. */
static void huge(void)
{
	struct fill_vm t;
	struct kvmfault_fill_options options = USUAL;
	struct kvmfault_fill *fill;
	fill_vm_create(&t, HUGETLB, 8 * HUGE_PAGE);
	options.gpa = RAM_GPA + 2 * HUGE_PAGE;
	options.len = PAGE;
	REFUSED(kvmfault_fill_start(t.s.m.library, &options, &fill), EINVAL, "len: ");
	options.gpa += PAGE;
	options.len = HUGE_PAGE - PAGE;
	REFUSED(kvmfault_fill_start(t.s.m.library, &options, &fill), EINVAL, "gpa: ");
	options.gpa = RAM_GPA + 6 * HUGE_PAGE;
	options.len = 2 * HUGE_PAGE + PAGE; /* the end is in no slot */
	fill = fill_vm_start(&t, &options);
	OK(kvmfault_fill_wait(fill, 60000));
	kvmfault_fill_free(fill);
	for (int n = 0; n < 8; n++)
		EQUAL("state", kvmfault_pages_state(t.s.m.library, RAM_GPA + n * HUGE_PAGE),
		      n < 6 ? KVMFAULT_PAGE_ABSENT : KVMFAULT_PAGE_PRESENT);
	pattern_check(&t.s.source.pattern, t.s.ram.hva + 6 * HUGE_PAGE, 6 * HUGE_PAGE / PAGE, 2 * HUGE_PAGE / PAGE);
	slot_vm_destroy(&t.s);
}

static atomic_uint finalized;

static void finalizer(void *opaque)
{
	(void)opaque;
	finalized++;
}

static void wrong_ranges(void)
{
	struct parts p;
	create(&p, MEMFD, 0);
#define WRONG(from, length, error, words)                                               \
	do {                                                                            \
		struct kvmfault_fill_options wrong = KVMFAULT_FILL_OPTIONS_INIT;        \
		struct kvmfault_fill *fill = (void *)1;                                 \
		wrong.finalizer = finalizer;                                            \
		wrong.gpa = from;                                                       \
		wrong.len = length;                                                     \
		REFUSED(kvmfault_fill_start(p.m.library, &wrong, &fill), error, words); \
		CHECK(!fill, "a handle after an error");                                \
	} while (0)
	WRONG(LOW_GPA + 1, PAGE, EINVAL, "gpa: ");
	WRONG(LOW_GPA + 512, PAGE, EINVAL, "gpa: ");
	WRONG(LOW_GPA, 1, EINVAL, "len: ");
	WRONG(LOW_GPA, PAGE + 2048, EINVAL, "len: ");
	WRONG(LOW_GPA, 0, EINVAL, "len: ");
	WRONG(LOW_GPA, -PAGE, EINVAL, "len: ");
	WRONG(-PAGE, PAGE, EINVAL, "wraps");
	WRONG(0, PAGE, ENOENT, "gpa: ");
	WRONG(LOW_GPA + FEW * PAGE, GAP * PAGE, ENOENT, "no slot");
	WRONG(HIGH_GPA + FEW * PAGE, 1ul << 40, ENOENT, "no slot");
	EQUAL("calls of the finalizer", finalized, 0);
	EQUAL("absent pages", kvmfault_pages_absent(p.m.library), 2 * FEW);
	destroy(&p);
}

static const struct test_case cases[] = {
	{ "slot", slot, true },
	{ "across", across, true },
	{ "beside-faults", beside_faults, true },
	{ "working-set", working_set, true },
	{ "shown-twice", shown_twice, true },
	{ "huge", huge, true },
	{ "wrong-ranges", wrong_ranges, false },
};
TEST_MAIN(cases)
