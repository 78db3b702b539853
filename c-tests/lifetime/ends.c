/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Slots and VMs begin and end in one thread while others use the memory: threads of the VMM that
 * touch it are never left asleep, and an end that overtakes a beginning ends that, too.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static atomic_int finalized;

static void count_finalizers(void *opaque)
{
	(void)opaque;
	finalized++;
}

/* ---- memory that is touched while its slot is set and deleted ---- */

enum { TOUCHERS = 2 };
static struct ram ram;
static atomic_ulong touched[TOUCHERS];
static atomic_bool stop_touching;

static int install_zeros(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	int ret = kvmfault_pages_zero(vm, fault->gpa, fault->len);
	/* Another thread was faster; or the slot or the VM has gone meanwhile. */
	CHECK(!ret || ret == -EEXIST || ret == -ENOENT || ret == -ESHUTDOWN, "kvmfault_pages_zero: %d: %s", ret,
	      kvmfault_last_error());
	return ret == -EEXIST ? KVMFAULT_RESOLVED : ret;
}

static void *touch(void *arg)
{
	uint64_t random = 1 + (uintptr_t)arg;
	while (!stop_touching) {
		(void)*(volatile uint8_t *)(ram.hva + random_number(&random) % ram.len);
		touched[(uintptr_t)arg]++;
		if (random % 4 == 0)
			sched_yield();
	}
	return NULL;
}

static void start_touching(pthread_t *threads)
{
	stop_touching = false;
	for (uintptr_t i = 0; i < TOUCHERS; i++)
		SYS(pthread_create(&threads[i], NULL, touch, (void *)i) ? -1 : 0);
}

static void end_touching(pthread_t *threads)
{
	stop_touching = true;
	for (int i = 0; i < TOUCHERS; i++)
		pthread_join(threads[i], NULL);
}

/* None of them sleeps forever, whatever has just been done. */
static void expect_all_go_on(void)
{
	for (int i = 0; i < TOUCHERS; i++) {
		unsigned long before = touched[i];
		UNTIL(touched[i] > before + 1);
	}
}

static void touched_while_set(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct machine m;
	pthread_t threads[TOUCHERS];
	unsigned long rounds = SCALED(100, 5);
	options.resolver = install_zeros;
	machine_create(&m, 0);
	machine_attach(&m, NULL, &options);
	ram_create(&ram, MEMFD, SCALED(128ul << 20, 8ul << 20) & -HUGE_PAGE);
	start_touching(threads);
	for (unsigned long i = 0; i < rounds; i++) {
		struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
		SYS(madvise(ram.hva, ram.len, MADV_REMOVE));
		OK(kvmfault_memslot_set(m.library, &slot));
		expect_all_go_on();
		slot.len = 0;
		OK(kvmfault_memslot_set(m.library, &slot));
		expect_all_go_on();
	}
	end_touching(threads);
	machine_destroy(&m);
	ram_destroy(&ram);
}

/* ---- VMs that are freed in the middle of a call that begins something ---- */

static struct machine m;
static atomic_int answered; /* 1 plus -errno of the call; 0 while it is under way */

static void *set_slot(void *vm)
{
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	answered = 1 - kvmfault_memslot_set(vm, &slot);
	return NULL;
}

static void *prepare_slot(void *vm)
{
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	answered = 1 - kvmfault_memslot_prepare(vm, &slot, &region);
	return NULL;
}

static void *switch_slot(void *vm)
{
	int ret = 0;
	/* It ends with the VM. */
	for (int i = 0; !ret; i++)
		ret = kvmfault_memslot_set_fast_only(vm, RAM_SLOT, i % 2);
	answered = 1 - ret;
	return NULL;
}

static void free_while(void *(*call)(void *), bool needs_slot)
{
	unsigned long rounds = SCALED(60, 6);
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = install_zeros;
	options.finalizer = count_finalizers;
	ram_create(&ram, MEMFD, SCALED(64ul << 20, 8ul << 20) & -HUGE_PAGE);
	unsigned long cut_short = 0;
	for (unsigned long i = 0; i < rounds; i++) {
		pthread_t thread, touchers[TOUCHERS];
		machine_create(&m, 0);
		machine_attach(&m, NULL, &options);
		if (needs_slot)
			machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
		/* A handle that is freed later keeps nothing registered. */
		struct vcpu *v = machine_add_vcpu(&m, 3);
		vcpu_attach(v);
		struct kvmfault_vm *vm = m.library;
		answered = 0;
		SYS(pthread_create(&thread, NULL, call, vm) ? -1 : 0);
		usleep(i * i * 3);
		kvmfault_vm_free(vm);
		UNTIL(answered);
		pthread_join(thread, NULL);
		int ret = 1 - answered;
		/* -EBADF: it had not begun. */
		CHECK(!ret || ret == -ESHUTDOWN || ret == -EBADF, "the call returned %d", ret);
		cut_short += ret == -ESHUTDOWN;
		start_touching(touchers);
		expect_all_go_on();
		end_touching(touchers);
		m.library = NULL;
		vcpu_detach(v);
		UNTIL(finalized == (int)i + 1);
		machine_destroy(&m);
		SYS(madvise(ram.hva, ram.len, MADV_REMOVE));
	}
	note("%lu of %lu calls cut short", cut_short, rounds);
	ram_destroy(&ram);
}

static void freed_while_set(void)
{
	free_while(set_slot, false);
}

static void freed_while_prepared(void)
{
	free_while(prepare_slot, false);
}

static void freed_while_switched(void)
{
	free_while(switch_slot, true);
}

/* ---- when it is over ---- */

static atomic_bool let_go, returned;
static atomic_int in_callback; /* 1 plus -errno of kvmfault_vm_close in the resolver */

static int answer_when_let_go(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)fault;
	in_callback = 1 - kvmfault_vm_close(vm, -1);
	resolver_vm.calls++;
	while (!let_go)
		usleep(1000);
	EQUAL("a call on the VM", kvmfault_pages_state(vm, RAM_GPA), -ESHUTDOWN);
	returned = true;
	return KVMFAULT_PENDING;
}

static void finalize_after_return(void *opaque)
{
	(void)opaque;
	CHECK(returned, "the finalizer ran before the callback returned");
	finalized++;
	/* Freeing is allowed here; other calls are as in any callback. */
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vm *vm;
	kvmfault_vcpu_free(resolver_vm.m.vcpu[0]->handle);
	REFUSED(kvmfault_vm_new(&options, &vm), EDEADLK, "callback");
}

static void *touch_one(void *arg)
{
	(void)*(volatile uint8_t *)arg;
	resolver_vm.finished++;
	return NULL;
}

static void set_up_finalized(kvmfault_resolver resolver)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = resolver;
	options.finalizer = finalize_after_return;
	resolver_vm_set_up_with(&options, MEMFD, 1, 3);
	vcpu_attach(resolver_vm.m.vcpu[0]);
}

static void forget_handles(void)
{
	resolver_vm.m.library = NULL;
	resolver_vm.m.vcpu[0]->handle = NULL;
	resolver_vm_tear_down();
}

/* kvmfault_vm_close waits for a callback that is under way, and then everything may go. */
static void closed(void)
{
	pthread_t thread;
	set_up_finalized(answer_when_let_go);
	struct kvmfault_vm *vm = resolver_vm.m.library;
	REFUSED(kvmfault_vm_close(NULL, 0), EINVAL, "NULL");
	SYS(pthread_create(&thread, NULL, touch_one, resolver_vm.ram.hva) ? -1 : 0);
	UNTIL(resolver_vm.calls == 1);
	EQUAL("kvmfault_vm_close in a callback", 1 - in_callback, -EDEADLK);
	for (int i = 0; i < 2; i++) {
		REFUSED(kvmfault_vm_close(vm, i), ETIMEDOUT, "under way");
		EQUAL("finalized", finalized, 0);
		REFUSED(kvmfault_pages_zero(vm, RAM_GPA, PAGE), ESHUTDOWN, "freed");
		struct kvmfault_memslot slot = slot_on(&resolver_vm.ram, RAM_SLOT + 1, RAM_GPA + resolver_vm.ram.len);
		REFUSED(kvmfault_memslot_set(vm, &slot), ESHUTDOWN, "freed");
	}
	/* Slots can still be deleted. */
	struct kvmfault_memslot slot = slot_on(&resolver_vm.ram, RAM_SLOT, RAM_GPA);
	slot.len = 0;
	OK(kvmfault_memslot_set(vm, &slot));
	/* No call installs the page any more, and no thread waits for it. */
	UNTIL(resolver_vm.finished == 1);
	pthread_join(thread, NULL);
	let_go = true;
	EQUAL("kvmfault_vm_close", kvmfault_vm_close(vm, 60000), 0);
	EQUAL("finalized", finalized, 1);
	REFUSED(kvmfault_vm_close(vm, 0), EBADF, "freed");
	forget_handles();
}

/* With nothing under way it is over at once; a vCPU's handle doesn't keep it, nor a fill's. */
static void finalized_before_handles(void)
{
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	pthread_t thread;
	returned = true;
	set_up_finalized(resolver_vm_answer_pending);
	options.finalizer = count_finalizers;
	OK(kvmfault_fill_start(resolver_vm.m.library, &options, &fill));
	SYS(pthread_create(&thread, NULL, touch_one, resolver_vm.ram.hva) ? -1 : 0);
	UNTIL(resolver_vm.calls);
	kvmfault_vm_free(resolver_vm.m.library);
	UNTIL(finalized == 2);
	UNTIL(resolver_vm.finished == 1);
	pthread_join(thread, NULL);
	EQUAL("kvmfault_fill_wait", kvmfault_fill_wait(fill, -1), -ESHUTDOWN);
	kvmfault_fill_free(fill);
	usleep(10000);
	EQUAL("finalized", finalized, 2);
	forget_handles();
}

static int install_all(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	int ret = source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
	return ret == -EEXIST ? 0 : ret;
}

/*
 * A fill's finalizer runs when the fill has ended, not when its handle goes; also if it ends before
 * kvmfault_fill_start has returned.
 */
static void fill_finalized_at_its_end(void)
{
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_vm_options vm_options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	int rounds = SCALED(100, 5);
	vm_options.resolver = install_all;
	resolver_vm_set_up_with(&vm_options, MEMFD, 0, 3);
	options.finalizer = count_finalizers;
	options.flags = KVMFAULT_FILL_KEEP_ARMED;
	for (int i = 0; i < rounds; i++) {
		OK(kvmfault_fill_start(resolver_vm.m.library, &options, &fill));
		OK(kvmfault_fill_wait(fill, -1));
		UNTIL(finalized == i + 1);
		kvmfault_fill_free(fill);
	}
	EQUAL("finalized", finalized, rounds);
	resolver_vm_tear_down();
}

static int free_and_answer(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	resolver_vm.m.library = NULL;
	kvmfault_vm_free(vm);
	EQUAL("a call on the VM", kvmfault_pages_zero(vm, fault->gpa, fault->len), -ESHUTDOWN);
	EQUAL("finalized while the resolver is under way", finalized, 0);
	returned = true;
	return KVMFAULT_RESOLVED;
}

/* A resolver that frees its VM. */
static void freed_in_a_resolver(void)
{
	pthread_t thread;
	set_up_finalized(free_and_answer);
	SYS(pthread_create(&thread, NULL, touch_one, resolver_vm.ram.hva) ? -1 : 0);
	UNTIL(resolver_vm.finished == 1);
	UNTIL(finalized == 1);
	pthread_join(thread, NULL);
	forget_handles();
}

/* KVM's slot outlives the library's VM: what the VMM maps next doesn't become the guest's. */
static void addresses_kept(void)
{
	enum { MAPPINGS = 200, WRITTEN = 0x6b6b6b6b };
	uint64_t *own[MAPPINGS];
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.resolver = install_all;
	resolver_vm_set_up_with(&options, MEMFD, 1, 3);
	struct vcpu *v = resolver_vm.m.vcpu[0];
	vcpu_attach(v);
	OK(kvmfault_pages_resolve(resolver_vm.m.library, RAM_GPA, resolver_vm.ram.len));
	resolver_vm_read(v, 1);
	vcpu_detach(v);
	struct kvmfault_vm *vm = resolver_vm.m.library;
	resolver_vm.m.library = NULL;
	EQUAL("kvmfault_vm_close", kvmfault_vm_close(vm, -1), 0);
	for (int i = 0; i < MAPPINGS; i++) {
		own[i] = mmap(NULL, resolver_vm.ram.len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(own[i] != MAP_FAILED, "mmap: %s", strerror(errno));
		memset(own[i], 0x5e, resolver_vm.ram.len);
	}
	resolver_vm.steps[0] = (struct step){ READ64, RAM_GPA + PAGE, 0, 0 };
	resolver_vm.steps[1] = (struct step){ WRITE64, RAM_GPA + 2 * PAGE, WRITTEN, 0 };
	resolver_vm.steps[2] = (struct step){ STOP, 0, 1, 0 };
	vcpu_load_script(v, resolver_vm.steps_gpa);
	/*
	 * An error where its memory was an alias of the library's; else it has its memory as
	 * before.
	 */
	while (ioctl(v->fd, KVM_RUN, 0) < 0 && errno == EINTR)
		;
	CHECK(resolver_vm.steps[0].value != 0x5e5e5e5e5e5e5e5e, "the guest reads memory of the VMM's own");
	for (int i = 0; i < MAPPINGS; i++)
		for (uint64_t at = 0; at < resolver_vm.ram.len / 8; at++)
			CHECK(own[i][at] == 0x5e5e5e5e5e5e5e5e, "the guest has written to memory of the VMM's own");
	resolver_vm.m.finalized = false;
	resolver_vm_tear_down();
}

static const struct test_case cases[] = {
	{ "touched-while-set", touched_while_set, true },
	{ "freed-while-set", freed_while_set, true },
	{ "freed-while-prepared", freed_while_prepared, true },
	{ "freed-while-switched", freed_while_switched, true },
	{ "closed", closed, true },
	{ "finalized-before-handles", finalized_before_handles, true },
	{ "fill-finalized-at-its-end", fill_finalized_at_its_end, true },
	{ "freed-in-a-resolver", freed_in_a_resolver, true },
	{ "addresses-kept", addresses_kept, true },
};
TEST_MAIN(cases)
