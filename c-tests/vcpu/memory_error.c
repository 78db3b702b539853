/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * PRESENT memory that breaks, as by a hardware error: the vCPU's loop returns a memory error with
 * the address, and does not fetch the page again. UFFDIO_POISON breaks it, through a userfaultfd
 * that the VMM opened and shares with the library.
 */
#define _GNU_SOURCE
#include "abi.h"
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGES = 16 };

/* Linux 6.6; older headers lack it. */
struct poison {
	struct uffdio_range range;
	uint64_t mode;
	int64_t updated;
};
#define POISON _IOWR(0xAA, 0x08, struct poison)
#define NEW_USERFAULTFD _IO(0xAA, 0x00)

static int open_userfaultfd(void)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0) {
		int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		fd = device < 0 ? -1 : ioctl(device, NEW_USERFAULTFD, O_CLOEXEC | O_NONBLOCK);
		close(device);
	}
	if (fd < 0)
		skip("userfaultfd: %s", strerror(errno));
	return fd;
}

static struct machine m;
static struct ram ram;
static struct source source;
static struct step *steps;
static uint64_t steps_gpa;
static int uffd;

static struct vcpu *set_up_slot(int cpl, enum backing backing, uint32_t kvm_flags)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
	if (!(probe.mechanisms_anon & 1u << KVMFAULT_MECHANISM_POISON_TRAP))
		skip("the kernel has no UFFDIO_POISON (Linux 6.6)");
	uffd = open_userfaultfd();
	options.uffd = uffd;
	ram_create(&ram, backing, PAGES * PAGE);
	machine_create(&m, PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	machine_attach(&m, &source, &options);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	slot.kvm_flags = kvm_flags;
	if (kvm_flags & KVM_MEM_READONLY && test_mechanism() == KVMFAULT_MECHANISM_MEMSLOT_FLAG && expected_abi() &&
	    !expected_abi()->readonly)
		skip("the flag does not go with READONLY (see read_only/slot)");
	OK(kvmfault_memslot_set(m.library, &slot));
	steps = machine_share(&m, PAGE, &steps_gpa);
	struct vcpu *v = machine_add_vcpu(&m, cpl);
	vcpu_attach(v);
	return v;
}

static struct vcpu *set_up(int cpl, enum backing backing)
{
	return set_up_slot(cpl, backing, 0);
}

static void tear_down(void)
{
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
	close(uffd);
}

static void load_read(struct vcpu *v, uint64_t page)
{
	steps[0] = (struct step){ READ64, RAM_GPA + page * PAGE + 8, 0, 0 };
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, steps_gpa);
}

static void check_read(struct vcpu *v, uint64_t page)
{
	load_read(v, page);
	EQUAL("stop", vcpu_run(v), 0);
	EQUAL("the word that the guest read", steps[0].value, pattern_word(&source.pattern, page, 1));
}

static void break_page(uint64_t page)
{
	struct poison poison = { .range = { (uintptr_t)ram.hva + page * PAGE, PAGE } };
	SYS(madvise(ram.hva + page * PAGE, PAGE, MADV_DONTNEED));
	SYS(ioctl(uffd, POISON, &poison));
}

static void expect_error(struct vcpu *v, uint64_t page, int lost)
{
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_MEMORY_ERROR, "%s", vcpu_describe(v, ret));
	OK(kvmfault_vcpu_memory_error(v->handle, &info));
	EQUAL("gpa", info.gpa, RAM_GPA + page * PAGE);
	EQUAL("hva", (uint8_t *)info.hva - ram.hva, page * PAGE);
	EQUAL("len", info.len, PAGE);
	EQUAL("lost", info.lost, lost);
}

static void broken_at(int cpl)
{
	struct vcpu *v = set_up(cpl, ANON);
	for (int page = 0; page < PAGES; page++)
		check_read(v, page);
	EQUAL("resolver calls", source.total, PAGES);
	UNTIL(kvmfault_pages_absent(m.library) == 0); /* the guest may be ahead of the counters */

	break_page(5);
	EQUAL("state", kvmfault_pages_state(m.library, RAM_GPA + 5 * PAGE), KVMFAULT_PAGE_PRESENT);
	load_read(v, 5);
	expect_error(v, 5, 0);
	/*
	 * Should the VMM go on, the error comes again; an access that KVM emulates is over, and the
	 * guest has read ones.
	 */
	if (!cpl && cpl0_is_emulated()) {
		EQUAL("stop", vcpu_run(v), 0);
		EQUAL("the word that the guest read", steps[0].value, UINT64_MAX);
	} else {
		expect_error(v, 5, 0);
	}
	EQUAL("resolver calls", source.total, PAGES);

	/* Other pages are as they were, and the vCPU goes on. */
	check_read(v, 4);
	check_read(v, 6);
	/* The VMM discards the page, and it is fetched anew. */
	OK(kvmfault_pages_discard(m.library, RAM_GPA + 5 * PAGE, PAGE));
	check_read(v, 5);
	EQUAL("resolver calls", source.total, PAGES + 1);
	tear_down();
}

static void broken(void)
{
	broken_at(3);
}

static void broken_cpl0(void)
{
	broken_at(0);
}

/*
 * KVM doesn't report where in a read-only slot the access was; a single lost page is found all the
 * same.
 */
static void broken_rom(void)
{
	struct vcpu *v = set_up_slot(3, ANON, KVM_MEM_READONLY);
	for (int page = 0; page < PAGES; page++)
		check_read(v, page);
	UNTIL(kvmfault_pages_absent(m.library) == 0); /* the guest may be ahead of the counters */
	break_page(5);
	load_read(v, 5);
	expect_error(v, 5, 0);
	check_read(v, 4);
	OK(kvmfault_pages_discard(m.library, RAM_GPA + 5 * PAGE, PAGE));
	check_read(v, 5);
	OK(kvmfault_pages_discard(m.library, RAM_GPA + 9 * PAGE, PAGE));
	OK(kvmfault_pages_lost(m.library, RAM_GPA + 9 * PAGE, PAGE));
	load_read(v, 9);
	expect_error(v, 9, 1);
	tear_down();
}

static atomic_bool stop;

static void *come_and_go(void *unused)
{
	uint64_t seed = 3;
	while (!stop) {
		/* Not with PAUSE: an emulator gives the other CPU a turn then, and a long one. */
		for (volatile unsigned n = random_number(&seed) % 20000; n; n--)
			;
		int ret = kvmfault_pages_discard(m.library, RAM_GPA + 2 * PAGE, PAGE);
		CHECK(ret == 0 || ret == -EBUSY, "discard: %d", ret);
		ret = source_install(&source, m.library, RAM_GPA + 2 * PAGE, PAGE);
		/* the resolver may have been first */
		CHECK(ret == 0 || ret == -EEXIST, "install: %d", ret);
	}
	return unused;
}

/*
 * A vCPU that finds an absent page's marker, and the page PRESENT whenever it looks, has met no
 * memory error, however often.
 */
static void coming_and_going(enum backing backing)
{
	pthread_t thread;
	unsigned long reads = 0;
	struct vcpu *v = set_up(3, backing);
	source.window = true; /* the other thread may be first */
	CHECK(!pthread_create(&thread, NULL, come_and_go, NULL), "pthread_create");
	double end = now() + SCALED(2, 1), latest = end + 60;
	for (; now() < end || (machine_stats(&m).pages_discarded <= 100 && now() < latest); reads++)
		check_read(v, 2);
	stop = true;
	pthread_join(thread, NULL);
	struct kvmfault_stats stats = machine_settled_stats(&m);
	note("%lu reads, %lu discards, %lu times the page was there after all", reads, stats.pages_discarded,
	     stats.outcome_mapped);
	CHECK(stats.pages_discarded > 100, "the page went only %lu times", stats.pages_discarded);
	tear_down();
}

static void coming_and_going_memfd(void)
{
	coming_and_going(MEMFD);
}

static void coming_and_going_anon(void)
{
	coming_and_going(ANON);
}

/*
 * One marker more or less is no memory error: an absent page that is touched, broken and discarded
 * many times.
 */
static void mended(void)
{
	struct vcpu *v = set_up(3, ANON);
	for (int i = 0; i < 50; i++) {
		check_read(v, 2);
		break_page(2);
		OK(kvmfault_pages_discard(m.library, RAM_GPA + 2 * PAGE, PAGE));
	}
	check_read(v, 2);
	EQUAL("resolver calls", source.total, 51);
	tear_down();
}

/* A userfaultfd that is handed over works as one that the library opens, and stays the VMM's. */
static void shared_uffd(void)
{
	struct vcpu *v = set_up(0, ANON);
	for (int page = 0; page < PAGES; page++)
		check_read(v, page);
	EQUAL("resolver calls", source.total, PAGES);
	tear_down();
	/* tear_down closed ours; the library's duplicate went with its VM. */
}

/* ---- SIGBUS that isn't KVM's word on an absent page ---- */

#define UNKNOWN ((uint8_t *)0x10000)

/* A thread can do this to itself only. */
static void send_sigbus(int code, void *address)
{
	siginfo_t info = { .si_signo = SIGBUS, .si_code = code };
	info.si_addr = address;
	SYS(syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), SIGBUS, &info));
}

/*
 * Broken memory that the guest hasn't touched is reported with its place; a signal that a process
 * sends has no such effect.
 */
static void other_codes(void)
{
	struct vcpu *v = set_up(3, MEMFD);
	check_read(v, 3);
	load_read(v, 4);
	send_sigbus(BUS_MCEERR_AO, ram.hva + 3 * PAGE + 8);
	expect_error(v, 3, 0);
	SYS(syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), SIGBUS));
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
	check_read(v, 4);
	tear_down();
}

static atomic_bool guest_runs;

static void send_sigbus_to_myself(int signal)
{
	(void)signal;
	send_sigbus(BUS_MCEERR_AR, UNKNOWN);
}

static void *loop_until_kicked(struct vcpu *v)
{
	vcpu_attach(v);
	steps[0] = (struct step){ JUMP, steps_gpa, 0, 0 };
	vcpu_load_script(v, steps_gpa);
	guest_runs = true;
	int *ret = v->opaque;
	*ret = kvmfault_vcpu_run(v->handle);
	guest_runs = false;
	return NULL;
}

static void set_other_slot(const struct ram *other, bool on)
{
	struct kvmfault_memslot slot = slot_on(other, RAM_SLOT + 1, RAM_GPA + (1ul << 30));
	slot.len = on ? slot.len : 0;
	OK(kvmfault_memslot_set(m.library, &slot));
}

/*
 * Three in a row at an address in no slot are a memory error, but not when slots come and go in
 * between: then the guest may meet each of them.
 */
static void unknown_address(void)
{
	static int ret;
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	struct ram other;
	struct vcpu *v = set_up(3, MEMFD);
	struct sigaction action = { .sa_handler = send_sigbus_to_myself };
	SYS(sigaction(SIGUSR2, &action, NULL));
	vcpu_detach(v);
	ram_create(&other, MEMFD, PAGE);
	for (int changes = 1; changes >= 0; changes--) {
		vcpu_start(v, loop_until_kicked, &ret);
		UNTIL(guest_runs);
		for (int n = 0; n < (changes ? 20 : 1000) && guest_runs; n++) {
			pthread_kill(v->thread, SIGUSR2);
			usleep(5000);
			if (changes)
				set_other_slot(&other, n % 2 == 0);
		}
		if (changes)
			OK(kvmfault_vcpu_kick(v->handle));
		vcpu_join(v);
		CHECK(ret == (changes ? KVMFAULT_INTERRUPTED : KVMFAULT_MEMORY_ERROR), "%s", vcpu_describe(v, ret));
		if (!changes) {
			OK(kvmfault_vcpu_memory_error(v->handle, &info));
			CHECK(info.gpa == UINT64_MAX && info.hva == UNKNOWN && !info.lost, "gpa %#lx, hva %p, lost %d",
			      info.gpa, info.hva, info.lost);
		}
		vcpu_detach(v);
	}
	tear_down();
	ram_destroy(&other);
}

static const struct test_case cases[] = {
	{ "broken", broken, true },
	{ "broken-cpl0", broken_cpl0, true },
	{ "broken-rom", broken_rom, true },
	{ "coming-and-going-memfd", coming_and_going_memfd, true },
	{ "coming-and-going-anon", coming_and_going_anon, true },
	{ "mended", mended, true },
	{ "shared-uffd", shared_uffd, true },
	{ "other-codes", other_codes, true },
	{ "unknown-address", unknown_address, true },
};
TEST_MAIN(cases)
