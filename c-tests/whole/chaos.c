/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Everything that a VMM may do to the same few pages, done at once for a few seconds, in no order:
 * vCPUs want them, the VMM's threads want them, they are discarded, pushed, prefetched and filled
 * in the background, the fast path and the dirty log go on and off, vCPUs are kicked, and the
 * resolver answers whatever it may. No byte that is read is wrong, nothing hangs, and at
 * the end everything can still be had.
 *
 * What fails here is a race that the other groups' orderly cases don't provoke. The seed differs
 * from run to run; it is said at the start, so that whatever fails tells it, and in the note.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

enum { PAGES = 256, VCPUS = 4, READAHEAD = 16, AT_ONCE = 16 };

static struct machine m;
static struct ram ram;
static struct source source;
static uint64_t list_gpa, seed;
static atomic_bool stop, honest; /* honest: the resolver installs the page at once */
static atomic_ulong passes, errors, interruptions, discards, busy, toggles, pushes, prefetches, fills, finished_fills,
	kicks, looks;

/* A number of this thread's own. */
static uint64_t random_below(uint64_t end)
{
	static _Thread_local uint64_t state;
	static atomic_ulong threads;
	if (!state)
		state = seed ^ (0x9e3779b97f4a7c15ul * ++threads) ?: 1;
	return random_number(&state) % end;
}

static void random_pages(uint64_t *gpa, uint64_t *len)
{
	uint64_t first = random_below(PAGES), count = 1 + random_below(random_below(4) ? 2 : 64);
	if (count > PAGES - first)
		count = PAGES - first;
	*gpa = RAM_GPA + first * PAGE;
	*len = count * PAGE;
}

/* Another thread may have been faster. */
static void install(uint64_t gpa, uint64_t len)
{
	int ret = source_install(&source, m.library, gpa, len);
	if (ret != -EEXIST)
		OK(ret);
}

/* ---- the resolver ---- */

/* Pages that it has promised. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t promised[PAGES];
static unsigned promises;

static bool promise(uint64_t gpa)
{
	pthread_mutex_lock(&lock);
	bool room = !honest && promises < PAGES;
	if (room)
		promised[promises++] = gpa;
	pthread_mutex_unlock(&lock);
	return room;
}

static bool keep_a_promise(void)
{
	uint64_t gpa = 0;
	pthread_mutex_lock(&lock);
	if (promises)
		gpa = promised[--promises];
	pthread_mutex_unlock(&lock);
	if (gpa)
		install(gpa, PAGE);
	return gpa;
}

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	uint64_t gpa = fault->window_gpa, len = fault->window_len;
	(void)opaque, (void)vm;
	CHECK(gpa >= RAM_GPA && gpa + len <= RAM_GPA + PAGES * PAGE && fault->gpa >= gpa && fault->gpa < gpa + len,
	      "the resolver is asked for [%#lx, +%#lx), page %#lx", gpa, len, fault->gpa);
	if (!honest) {
		if (random_below(64) == 0)
			usleep((useconds_t)random_below(300));
		switch (random_below(40)) {
		case 0:
			return KVMFAULT_RETRY;
		case 1:
			return -EIO;
		case 2:
		case 3:
			if (promise(fault->gpa))
				return KVMFAULT_PENDING;
			break;
		case 4: /* less than it was offered */
			gpa = fault->gpa;
			len = fault->len;
			break;
		case 5: /* installed, and then a failure: the page is there all the same */
			install(fault->gpa, fault->len);
			return -EEXIST;
		}
	}
	install(gpa, len);
	return KVMFAULT_RESOLVED;
}

/* ---- who does what ---- */

static void *run_vcpu(struct vcpu *v)
{
	uint32_t found;
	vcpu_attach(v);
	while (!stop) {
		uint64_t some = list_gpa + random_below(PAGES - AT_ONCE + 1) * sizeof(uint32_t);
		vcpu_load_verify(v, RAM_GPA, some, AT_ONCE, &source.pattern, READ_FIRST);
		for (bool done = false; !done && !stop;) {
			int ret = kvmfault_vcpu_run(v->handle);
			switch (ret) {
			case KVMFAULT_INTERRUPTED:
				interruptions++;
				break;
			case -EIO:
				errors++;
				break;
			default:
				CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &found), "%s", vcpu_describe(v, ret));
				done = true;
				passes++;
				vcpu_check_verified(v, found);
			}
		}
	}
	return NULL;
}

static void discard_some(void)
{
	uint64_t gpa, len;
	random_pages(&gpa, &len);
	int ret = kvmfault_pages_discard(m.library, gpa, len);
	if (ret == -EBUSY) { /* memory is ordinary after a fill */
		busy++;
		usleep(1000);
		return;
	}
	OK(ret);
	discards++;
	/* In storms, with calms in which a fill may come to its end. */
	usleep(random_below(500) ? (useconds_t)random_below(100) : 100000);
}

static void push_some(void)
{
	uint64_t gpa, len;
	if (keep_a_promise())
		return;
	random_pages(&gpa, &len);
	install(gpa, len);
	pushes++;
	usleep(2000);
}

static void prefetch_some(void)
{
	uint64_t gpa, len;
	random_pages(&gpa, &len);
	int ret = kvmfault_pages_resolve(m.library, gpa, len);
	if (ret != -EIO)
		OK(ret);
	prefetches++;
	usleep(500);
}

static void toggle(void)
{
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	if (random_below(4)) {
		OK(kvmfault_memslot_set_fast_only(m.library, RAM_SLOT, random_below(3) > 0));
	} else {
		slot.kvm_flags = random_below(2) ? KVM_MEM_LOG_DIRTY_PAGES : 0;
		OK(kvmfault_memslot_set(m.library, &slot));
	}
	toggles++;
	usleep((useconds_t)random_below(10000));
}

static void fill_for_a_while(void)
{
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	options.threads = 1 + (uint32_t)random_below(2);
	options.batch = 1 + (uint32_t)random_below(64);
	options.bytes_per_second = random_below(2) ? 0 : 4 << 20;
	options.flags = random_below(3) ? KVMFAULT_FILL_KEEP_ARMED : random_below(2) ? KVMFAULT_FILL_NO_COLLAPSE : 0;
	int ret = kvmfault_fill_start(m.library, &options, &fill);
	if (ret == -EBUSY) { /* the last one is just ending */
		usleep(1000);
		return;
	}
	OK(ret);
	fills++;
	ret = kvmfault_fill_wait(fill, (int64_t)random_below(60));
	CHECK(ret == 0 || ret == -ETIMEDOUT || ret == -EIO, "a fill ended with %d", ret);
	finished_fills += ret == 0;
	if (random_below(2))
		OK(kvmfault_fill_stop(fill));
	kvmfault_fill_free(fill);
	usleep((useconds_t)random_below(20000));
}

static void kick_one(void)
{
	/* All handles are there before this begins, and until it has ended. */
	kvmfault_vcpu_kick(m.vcpu[random_below(VCPUS)]->handle);
	kicks++;
	usleep((useconds_t)random_below(3000));
}

static void look_at_one(void)
{
	uint64_t page = random_below(PAGES);
	pattern_check(&source.pattern, ram.hva + page * PAGE, page, 1);
	looks++;
}

static void *again_and_again(void *action)
{
	while (!stop)
		(*(void (**)(void))action)();
	return NULL;
}

/* Has everything happened? */
static bool enough(void)
{
	return passes > VCPUS && errors && interruptions && discards && pushes && prefetches && toggles > 2 &&
	       fills > 1;
}

static void everything(enum backing backing)
{
	static void (*const actions[])(void) = { discard_some,     push_some, prefetch_some, toggle,
						 fill_for_a_while, kick_one,  look_at_one };
	enum { ACTIONS = sizeof(actions) / sizeof(*actions) };
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	pthread_t threads[ACTIONS];
	struct timespec time;
	clock_gettime(CLOCK_REALTIME, &time);
	seed = (uint64_t)time.tv_sec * 1000000007 + (uint64_t)time.tv_nsec;
	printf("seed %#lx\n", seed);
	options.resolver = resolve;
	options.readahead = READAHEAD;
	ram_create(&ram, backing, PAGES * PAGE);
	machine_create(&m, PAGES * sizeof(uint32_t));
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	machine_attach(&m, NULL, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	list_shuffle(machine_share(&m, PAGES * sizeof(uint32_t), &list_gpa), PAGES, 5);
	for (int i = 0; i < VCPUS; i++)
		vcpu_start(machine_add_vcpu(&m, i == VCPUS - 1 ? 0 : 3), run_vcpu, NULL);
	for (int i = 0; i < VCPUS; i++)
		UNTIL(*(struct kvmfault_vcpu *volatile *)&m.vcpu[i]->handle);
	/* Only vCPUs may touch private memory that is absent. */
	int running = backing == MEMFD ? ACTIONS : ACTIONS - 1;
	for (int i = 0; i < running; i++)
		CHECK(!pthread_create(&threads[i], NULL, again_and_again, (void *)&actions[i]), "pthread_create");
	double begin = now();
	while (now() < begin + SCALED(6, 2) || (!enough() && now() < begin + 60))
		wait_a_little();

	/*
	 * No page is announced any more, and each announced one is installed: none of the threads
	 * that are joined waits forever.
	 */
	pthread_mutex_lock(&lock);
	honest = true;
	pthread_mutex_unlock(&lock);
	stop = true;
	while (keep_a_promise())
		;
	for (int i = 0; i < VCPUS; i++)
		kvmfault_vcpu_kick(m.vcpu[i]->handle);
	for (int i = 0; i < running; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(m.vcpu[i]);

	/* All pages can be read, and the counters agree. */
	OK(kvmfault_pages_resolve(m.library, RAM_GPA, ram.len));
	EQUAL("absent", kvmfault_pages_absent(m.library), 0);
	struct kvmfault_stats stats;
	/* a fill may not have booked its last pages */
	UNTIL((stats = machine_stats(&m), stats.pages_copied - stats.pages_discarded == PAGES));
	CHECK(enough(),
	      "%lu passes, %lu errors, %lu interruptions, %lu discards, %lu pushes, %lu prefetches, %lu toggles, %lu "
	      "fills",
	      passes, errors, interruptions, discards, pushes, prefetches, toggles, fills);
	if (backing == MEMFD)
		pattern_check(&source.pattern, ram.hva, 0, PAGES);
	note("seed %#lx: %lu passes, %lu errors, %lu interruptions, %lu discards (%lu busy), %lu pages discarded, %lu "
	     "toggles, %lu of %lu fills finished, "
	     "%lu looks",
	     seed, passes, errors, interruptions, discards, busy, stats.pages_discarded, toggles, finished_fills, fills,
	     looks);
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
}

static void everything_memfd(void)
{
	everything(MEMFD);
}

static void everything_anon(void)
{
	everything(ANON);
}

static const struct test_case cases[] = {
	{ "memfd", everything_memfd, true },
	{ "anon", everything_anon, true },
};
TEST_MAIN(cases)
