/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VMM that keeps its own KVM_RUN loop and its own memslot ioctls (as QEMU does): it calls only
 * kvmfault_memslot_prepare, _handle_exit, _resume, _on_sigbus and _kick.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { VCPUS = 4, PAGES = 2048 };

static void prepare_slot(const struct machine *m, const struct ram *ram)
{
	struct kvmfault_memslot slot = slot_on(ram, RAM_SLOT, RAM_GPA);
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	OK(kvmfault_memslot_prepare(m->library, &slot, &region));
	CHECK(region.slot == RAM_SLOT && region.guest_phys_addr == RAM_GPA && region.memory_size == ram->len,
	      "the region is not the slot's: %u, %#lx, %#lx", region.slot, region.guest_phys_addr, region.memory_size);
	machine_set_region(m, &region);
}

/* First KVM, then the library. */
static void delete_slot(const struct machine *m)
{
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	struct kvm_userspace_memory_region none = { .slot = RAM_SLOT };
	SYS(ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &none));
	slot.slot = RAM_SLOT;
	OK(kvmfault_memslot_prepare(m->library, &slot, &region));
	EQUAL("memory_size of a deleted slot", region.memory_size, 0);
	EQUAL("pages_state after the slot's end", kvmfault_pages_state(m->library, RAM_GPA), -ENOENT);
}

/* ---- signals by the VMM's handlers ---- */

static _Thread_local struct vcpu *current;

static void on_kick(int signal)
{
	(void)signal;
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	errno = 4711;
	if (!current || kvmfault_vcpu_on_sigbus(current->handle, info->si_code, info->si_addr) != 1 || errno != 4711)
		_exit(99);
}

static void attach(struct vcpu *v, bool by_handler, bool resumes)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	current = v;
	options.fd = v->fd;
	options.run = v->run;
	options.flags = resumes ? KVMFAULT_VCPU_RESUMES : 0;
	if (by_handler) {
		struct sigaction kick = { .sa_handler = on_kick };
		struct sigaction bus = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
		SYS(sigaction(SIGUSR1, &kick, NULL));
		SYS(sigaction(SIGBUS, &bus, NULL));
		options.sigbus = KVMFAULT_SIGBUS_BY_HANDLER;
		options.kick_signal = SIGUSR1;
	}
	OK(kvmfault_vcpu_new(v->machine->library, &options, &v->handle));
}

/* ---- the VMM's loop ---- */

/* Like kvmfault_vcpu_run. */
static int own_run(struct vcpu *v, bool resumes)
{
	static atomic_uint turn;
	for (;;) {
		if (resumes) {
			int ret = kvmfault_vcpu_resume(v->handle);
			if (ret != KVMFAULT_HANDLED)
				return ret;
		}
		int ret = ioctl(v->fd, KVM_RUN, 0);
		/* Both are allowed: ioctl's own result, or -errno. */
		if (ret == -1 && turn++ % 2)
			ret = -errno;
		ret = kvmfault_vcpu_handle_exit(v->handle, ret);
		if (ret != KVMFAULT_HANDLED)
			return ret;
	}
}

struct loop {
	bool by_handler, resumes;
	atomic_ulong interrupted, surplus; /* the latter without a kick */
	atomic_uint done;
};

static void *run_guest(struct vcpu *v)
{
	struct loop *loop = v->opaque;
	struct kvm_regs r;
	uint64_t seen = 0;
	uint32_t value;
	int ret;
	attach(v, loop->by_handler, loop->resumes);
	OK(kvmfault_vcpu_kick(v->handle)); /* one at least, however fast the guest is */
	while ((ret = own_run(v, loop->resumes)) == KVMFAULT_INTERRUPTED) {
		struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
		OK(kvmfault_vcpu_stats(v->handle, &stats));
		loop->interrupted++;
		loop->surplus += stats.kicks == seen;
		seen = stats.kicks;
	}
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	SYS(ioctl(v->fd, KVM_GET_REGS, &r));
	CHECK(value == 0, "vCPU %d (CPL %d) found %#llx at %#llx, not %#llx", v->number, v->cpl, r.rbx, r.rdi, r.rdx);
	loop->done++;
	return NULL;
}

/* The guests check every page, while they are kicked at random and some pages come late. */
static void restore(bool by_handler, bool resumes)
{
	struct loop loop = { .by_handler = by_handler, .resumes = resumes };
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct machine m;
	struct ram ram;
	struct source source;
	struct later later;
	uint64_t list_gpa, seed = 3;
	unsigned long kicks = VCPUS; /* each its own */
	unsigned long delayed = 0;   /* see kicks.c */

	ram_create(&ram, MEMFD, PAGES * PAGE);
	machine_create(&m, PAGES * sizeof(uint32_t));
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	later_create(&later, &source, 4, 200);
	options.resolver = later_resolve;
	options.opaque = &later;
	machine_attach(&m, NULL, &options);
	OK(kvmfault_vm_enable(m.library, 0));
	prepare_slot(&m, &ram);
	uint32_t *list = machine_share(&m, PAGES * sizeof(*list), &list_gpa);
	list_shuffle(list, PAGES, 11);
	for (int i = 0; i < VCPUS; i++) {
		struct vcpu *v = machine_add_vcpu(&m, i % 2 ? 0 : 3);
		/* Pairs, one at each level, go for the same half of the memory. */
		vcpu_load_verify(v, RAM_GPA, list_gpa + i / 2 * (PAGES / 2) * sizeof(*list), PAGES / 2, &source.pattern,
				 READ_FIRST);
		vcpu_start(v, run_guest, &loop);
	}
	while (loop.done < VCPUS) {
		struct vcpu *v = m.vcpu[random_number(&seed) % VCPUS];
		usleep(random_number(&seed) % 300);
		if (!v->handle)
			continue;
		double began = now();
		kicks += kvmfault_vcpu_kick(v->handle) == 0;
		delayed += by_handler && now() - began > 0.05;
	}
	for (int i = 0; i < VCPUS; i++)
		vcpu_join(m.vcpu[i]);
	later_stop(&later);
	struct kvmfault_stats stats = machine_settled_stats(&m);
	EQUAL("resolver calls", stats.resolver_calls, PAGES);
	EQUAL("the resolver's own count", source.total, PAGES);
	UNTIL(kvmfault_pages_absent(m.library) == 0); /* the guest may be ahead of the counters */
	pattern_check(&source.pattern, ram.hva, 0, PAGES);
	printf("%lu faults, %lu MMIO reads, %lu kicks, INTERRUPTED %lu times\n", stats.faults_vcpu, stats.mmio_reads,
	       kicks, loop.interrupted);
	CHECK(loop.interrupted >= VCPUS, "a vCPU did not see the kick before its first KVM_RUN");
	CHECK(loop.surplus <= delayed, "INTERRUPTED %lu times without a kick; %lu kicks were delayed", loop.surplus,
	      delayed);
	delete_slot(&m);
	machine_destroy(&m);
	ram_destroy(&ram);
	source_destroy(&source);
}

static void mask(void)
{
	restore(false, false);
}

static void handler(void)
{
	restore(true, false);
}

static void mask_resumes(void)
{
	restore(false, true);
}

static void handler_resumes(void)
{
	restore(true, true);
}

/* ---- an access that KVM emulates, left in the middle ---- */

static atomic_uint asked;

static int pending(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm, (void)fault;
	asked++;
	return KVMFAULT_PENDING;
}

struct middle {
	struct machine m;
	struct ram ram;
	struct source source;
	struct step *steps;
	struct vcpu *v;
	bool resumes;
	atomic_int interrupted;
	atomic_bool stopped;
};

/* A guest at CPL 0 that reads 8 bytes across the border of two absent pages. */
static void middle_create(struct middle *t, kvmfault_resolver resolver, uint64_t pages, bool resumes)
{
	uint64_t steps_gpa;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	memset(t, 0, sizeof(*t));
	t->resumes = resumes;
	if (!cpl0_comes_as_mmio())
		skip("accesses at CPL 0 to absent pages don't come as MMIO exits here with %s",
		     mechanism_name(test_mechanism()));
	ram_create(&t->ram, MEMFD, pages * PAGE);
	machine_create(&t->m, PAGE);
	source_create(&t->source, RAM_GPA, t->ram.len, PATTERN);
	options.resolver = resolver;
	options.opaque = &t->source;
	machine_attach(&t->m, NULL, &options);
	prepare_slot(&t->m, &t->ram);
	t->steps = machine_share(&t->m, PAGE, &steps_gpa);
	t->steps[0] = (struct step){ READ64, RAM_GPA + PAGE - 3, 0, 0 };
	t->steps[1] = (struct step){ STOP, 0, 0, 0 };
	t->v = machine_add_vcpu(&t->m, 0);
	vcpu_load_script(t->v, steps_gpa);
}

static void middle_destroy(struct middle *t)
{
	machine_destroy(&t->m);
	ram_destroy(&t->ram);
	source_destroy(&t->source);
}

static void *middle_main(struct vcpu *v)
{
	struct middle *t = v->opaque;
	uint32_t value;
	int ret;
	attach(v, false, t->resumes);
	while ((ret = own_run(v, t->resumes)) == KVMFAULT_INTERRUPTED)
		t->interrupted++;
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	t->stopped = true;
	return NULL;
}

static void middle_finish(struct middle *t)
{
	uint64_t words[2] = { pattern_word(&t->source.pattern, 0, 511), pattern_word(&t->source.pattern, 1, 0) },
		 expected;
	vcpu_join(t->v);
	memcpy(&expected, (uint8_t *)words + 5, 8);
	EQUAL("what the guest read", t->steps[0].value, expected);
	EQUAL("resolver calls", asked, 2);
	middle_destroy(t);
}

/*
 * With KVMFAULT_VCPU_RESUMES a kick ends the wait, as often as one comes, and the access still ends
 * with the right bytes.
 */
static void middle_resumes(void)
{
	static struct middle t;
	middle_create(&t, pending, 2, true);
	vcpu_start(t.v, middle_main, &t);
	UNTIL(asked == 1);
	for (int i = 1; i <= 20; i++) {
		usleep(i * 500);
		OK(kvmfault_vcpu_kick(t.v->handle));
		UNTIL(t.interrupted == i);
		EQUAL("the page's state", kvmfault_pages_state(t.m.library, RAM_GPA), KVMFAULT_PAGE_RESOLVING);
	}
	OK(source_install(&t.source, t.m.library, RAM_GPA, PAGE));
	UNTIL(asked == 2); /* the other page */
	OK(kvmfault_vcpu_kick(t.v->handle));
	UNTIL(t.interrupted == 21);
	EQUAL("stopped too early", t.stopped, false);
	OK(source_install(&t.source, t.m.library, RAM_GPA + PAGE, PAGE));
	middle_finish(&t);
	EQUAL("INTERRUPTED", t.interrupted, 21);
}

/* Without it such a wait isn't left; the kick is seen afterwards. */
static void middle_stays(void)
{
	static struct middle t;
	middle_create(&t, pending, 2, false);
	vcpu_start(t.v, middle_main, &t);
	UNTIL(asked == 1);
	OK(kvmfault_vcpu_kick(t.v->handle));
	usleep(200000);
	EQUAL("INTERRUPTED in the middle", t.interrupted, 0);
	OK(source_install(&t.source, t.m.library, RAM_GPA, PAGE));
	UNTIL(asked == 2);
	OK(source_install(&t.source, t.m.library, RAM_GPA + PAGE, PAGE));
	middle_finish(&t);
	EQUAL("INTERRUPTED in all", t.interrupted, 1);
}

/* A resolver that fails every other time. */
static int unreliable(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	return ++asked % 2 ? -EIO : source_install(opaque, vm, fault->gpa, fault->len);
}

/*
 * After an error nothing of such an access is lost if KVM isn't called before _resume has
 * succeeded, also without KVMFAULT_VCPU_RESUMES. The guest reads and writes across borders of pages
 * that are both absent.
 */
static void middle_fails(void)
{
	enum { WRITTEN = 3, VALUE = 0x12345678 };
	static struct middle t;
	uint64_t words[2], expected;
	uint32_t value;
	unsigned failures = 0;
	int ret;
	middle_create(&t, unreliable, 4, false);
	t.steps[1] = (struct step){ WRITE64, RAM_GPA + WRITTEN * PAGE - 2, VALUE, 0 };
	t.steps[2] = (struct step){ STOP, 0, 0, 0 };
	attach(t.v, false, false);
	for (;;) {
		ret = kvmfault_vcpu_handle_exit(t.v->handle, ioctl(t.v->fd, KVM_RUN, 0));
		for (; ret == -EIO; failures++)
			ret = kvmfault_vcpu_resume(t.v->handle);
		if (ret != KVMFAULT_HANDLED)
			break;
	}
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(t.v, &value), "%s", vcpu_describe(t.v, ret));
	EQUAL("failures", failures, 4);
	for (int i = 0; i < 2; i++)
		words[i] = pattern_word(&t.source.pattern, i, i ? 0 : 511);
	memcpy(&expected, (uint8_t *)words + 5, 8);
	EQUAL("what the guest read", t.steps[0].value, expected);
	memcpy(&expected, t.ram.hva + WRITTEN * PAGE - 2, 8);
	EQUAL("what the guest wrote", expected, VALUE);
	middle_destroy(&t);
}

static int retry(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm, (void)fault;
	return KVMFAULT_RETRY;
}

/* A resolver that never has enough is an error in the middle, too. */
static void middle_retries(void)
{
	static struct middle t;
	middle_create(&t, retry, 2, false);
	attach(t.v, false, false);
	SYS(ioctl(t.v->fd, KVM_RUN, 0));
	REFUSED(kvmfault_vcpu_handle_exit(t.v->handle, 0), ELOOP, "retries");
	middle_destroy(&t);
}

static const struct test_case cases[] = {
	{ "mask", mask, true },
	{ "handler", handler, true },
	{ "mask-resumes", mask_resumes, true },
	{ "handler-resumes", handler_resumes, true },
	{ "middle-resumes", middle_resumes, true },
	{ "middle-stays", middle_stays, true },
	{ "middle-fails", middle_fails, true },
	{ "middle-retries", middle_retries, true },
};
TEST_MAIN(cases)
