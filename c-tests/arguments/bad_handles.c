/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Handles that are NULL, freed, of another type, or no handles at all: each function refuses them
 * without crashing.
 */
#define _GNU_SOURCE
#include "intact_vm.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

static uint8_t bytes[PAGE];
static atomic_uint finalized;

static void finalizer(void *opaque)
{
	(void)opaque;
	finalized++;
}

/* Every function that takes a VM. */
static void refuse_vm(struct kvmfault_vm *vm, int error)
{
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	struct kvmfault_vcpu *vcpu = (struct kvmfault_vcpu *)1;
	struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	REFUSED(kvmfault_vm_mechanism(vm), error, "vm");
	REFUSED(kvmfault_vm_enable(vm, 0), error, "vm");
	REFUSED(kvmfault_vm_check_guest(vm, -1), error, "vm");
	REFUSED(kvmfault_memslot_set(vm, &slot), error, "vm");
	REFUSED(kvmfault_memslot_prepare(vm, &slot, &region), error, "vm");
	REFUSED(kvmfault_memslot_set_fast_only(vm, RAM_SLOT, 1), error, "vm");
	REFUSED(kvmfault_memslot_mechanism(vm, RAM_SLOT), error, "vm");
	REFUSED(kvmfault_vm_stats(vm, &stats), error, "vm");
	REFUSED(kvmfault_pages_install(vm, INTACT_VM_GPA, bytes, PAGE), error, "vm");
	REFUSED(kvmfault_pages_zero(vm, INTACT_VM_GPA, PAGE), error, "vm");
	REFUSED(kvmfault_pages_map(vm, INTACT_VM_GPA, PAGE), error, "vm");
	REFUSED(kvmfault_pages_lost(vm, INTACT_VM_GPA, PAGE), error, "vm");
	REFUSED(kvmfault_pages_discard(vm, INTACT_VM_GPA, PAGE), error, "vm");
	REFUSED(kvmfault_pages_give_back(vm, INTACT_VM_GPA, PAGE), error, "vm");
	REFUSED(kvmfault_pages_resolve(vm, INTACT_VM_GPA, PAGE), error, "vm");
	REFUSED(kvmfault_pages_arrived(vm, bytes, PAGE), error, "vm");
	REFUSED(kvmfault_pages_missing(vm, bytes, PAGE), error, "vm");
	CHECK(!kvmfault_vm_address(vm, bytes), "an address of no VM");
	REFUSED(kvmfault_pages_state(vm, INTACT_VM_GPA), error, "vm");
	REFUSED(kvmfault_pages_absent(vm), error, "vm");
	REFUSED(kvmfault_vcpu_new(vm, &options, &vcpu), error, "vm");
	CHECK(vcpu == NULL, "the handle is %p after an error", (void *)vcpu);
	REFUSED(kvmfault_fill_start(vm, &fill_options, &fill), error, "vm");
	REFUSED(kvmfault_working_set_record(vm, 1), error, "vm");
	REFUSED(kvmfault_working_set_save(vm, 1), error, "vm");
}

/* Every function that takes a fill. */
static void refuse_fill(struct kvmfault_fill *fill, int error)
{
	struct kvmfault_fill_progress progress = KVMFAULT_FILL_PROGRESS_INIT;
	REFUSED(kvmfault_fill_wait(fill, -1), error, "fill");
	REFUSED(kvmfault_fill_wait_working_set(fill, -1), error, "fill");
	REFUSED(kvmfault_fill_status(fill, &progress), error, "fill");
	REFUSED(kvmfault_fill_stop(fill), error, "fill");
	REFUSED(kvmfault_fill_pause(fill), error, "fill");
	REFUSED(kvmfault_fill_resume(fill), error, "fill");
}

/* Every function that takes a vCPU. The two that signal handlers may call have no message. */
static void refuse_vcpu(struct kvmfault_vcpu *vcpu, int error)
{
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	REFUSED(kvmfault_vcpu_run(vcpu), error, "vcpu");
	REFUSED(kvmfault_vcpu_handle_exit(vcpu, 0), error, "vcpu");
	REFUSED(kvmfault_vcpu_handle_exit(vcpu, -EINTR), error, "vcpu");
	REFUSED(kvmfault_vcpu_resume(vcpu), error, "vcpu");
	REFUSED(kvmfault_vcpu_resolve(vcpu, INTACT_VM_GPA, 1), error, "vcpu");
	REFUSED(kvmfault_vcpu_memory_error(vcpu, &info), error, "vcpu");
	REFUSED(kvmfault_vcpu_stats(vcpu, &stats), error, "vcpu");
	EQUAL("kick", kvmfault_vcpu_kick(vcpu), -error);
	EQUAL("on_sigbus", kvmfault_vcpu_on_sigbus(vcpu, BUS_MCEERR_AR, bytes), -error);
}

static int resolve_from(void *source, struct kvmfault_vm *vm, uint64_t gpa)
{
	struct kvmfault_fault fault = {
		.size = sizeof(fault), .gpa = gpa, .len = PAGE, .window_gpa = gpa, .window_len = PAGE
	};
	return kvmfault_file_source_resolve(source, vm, &fault);
}

static struct kvmfault_file_source *new_source(const struct intact_vm *s)
{
	struct kvmfault_file_source *source;
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	range.gpa = INTACT_VM_GPA;
	range.len = INTACT_VM_LEN;
	OK(kvmfault_file_source_new(s->ram.fd, &range, 1, &source));
	return source;
}

static void null_handles(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	refuse_vm(NULL, EINVAL);
	refuse_vcpu(NULL, EINVAL);
	refuse_fill(NULL, EINVAL);
	REFUSED(resolve_from(NULL, s.machine.library, INTACT_VM_GPA), EINVAL, "source");
	struct kvmfault_file_source *source = new_source(&s);
	REFUSED(kvmfault_file_source_resolve(source, s.machine.library, NULL), EINVAL, "fault");
	REFUSED(resolve_from(source, NULL, INTACT_VM_GPA), EINVAL, "vm");
	kvmfault_file_source_free(source);

	kvmfault_vm_free(NULL);
	kvmfault_vcpu_free(NULL);
	kvmfault_fill_free(NULL);
	kvmfault_file_source_free(NULL);
	kvmfault_file_source_finalize(NULL);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/*
 * Another VM's handle is freed, and freed again. The second time affects neither the intact VM nor
 * the finalizer.
 */
static void freed_vm(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vm *vm;
	options.kvm_fd = s.machine.kvm;
	options.vm_fd = s.machine.vm;
	options.resolver = source_resolve;
	options.finalizer = finalizer;
	OK(kvmfault_vm_new(&options, &vm));
	kvmfault_vm_free(vm);
	for (double end = now() + 5; now() < end && !finalized;)
		usleep(1000);
	EQUAL("calls of the finalizer", finalized, 1);

	refuse_vm(vm, EBADF);
	kvmfault_vm_free(vm);
	CHECK(strstr(kvmfault_last_error(), "freed"), "the message is: %s", kvmfault_last_error());
	kvmfault_vm_free(vm);
	refuse_vm(vm, EBADF);
	EQUAL("calls of the finalizer", finalized, 1);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void freed_vcpu(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvmfault_vcpu *vcpu = s.vcpu->handle;
	kvmfault_vcpu_free(vcpu);
	refuse_vcpu(vcpu, EBADF);
	kvmfault_vcpu_free(vcpu);
	CHECK(strstr(kvmfault_last_error(), "freed"), "the message is: %s", kvmfault_last_error());
	vcpu_attach(s.vcpu); /* the vCPU itself may have a new one, and the old one stays dead */
	refuse_vcpu(vcpu, EBADF);
	kvmfault_vcpu_free(vcpu);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void freed_source(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvmfault_file_source *source = new_source(&s);
	kvmfault_file_source_free(source);
	kvmfault_file_source_free(source);
	kvmfault_file_source_finalize(source);
	CHECK(strstr(kvmfault_last_error(), "freed"), "the message is: %s", kvmfault_last_error());
	REFUSED(resolve_from(source, s.machine.library, INTACT_VM_GPA), EBADF, "source");
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void freed_fill(void)
{
	struct intact_vm s;
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	intact_vm_create(&s);
	options.bytes_per_second = 1; /* it does nothing to speak of */
	options.batch = 1;
	options.finalizer = finalizer;
	finalized = 0;
	OK(kvmfault_fill_start(s.machine.library, &options, &fill));
	kvmfault_fill_free(fill);
	refuse_fill(fill, EBADF);
	kvmfault_fill_free(fill);
	CHECK(strstr(kvmfault_last_error(), "freed"), "the message is: %s", kvmfault_last_error());
	UNTIL(finalized == 1);
	intact_vm_learn(&s);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* vCPU handles outlive their VM, as a VMM's threads do: each call reports that the VM is gone. */
static void vcpu_of_a_freed_vm(void)
{
	struct intact_vm s;
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	intact_vm_create(&s);
	kvmfault_vm_free(s.machine.library);
	REFUSED(kvmfault_vcpu_run(s.vcpu->handle), ESHUTDOWN, "freed");
	REFUSED(kvmfault_vcpu_resume(s.vcpu->handle), ESHUTDOWN, "freed");
	REFUSED(kvmfault_vcpu_handle_exit(s.vcpu->handle, -EINTR), ESHUTDOWN, "freed");
	OK(kvmfault_vcpu_kick(s.vcpu->handle));
	OK(kvmfault_vcpu_stats(s.vcpu->handle, &stats));
	refuse_vm(s.machine.library, EBADF);
	kvmfault_vcpu_free(s.vcpu->handle);
	refuse_vcpu(s.vcpu->handle, EBADF);
}

/* A handle of one type given as another: C's compiler says nothing where a void * is on the way. */
static void handles_of_another_type(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct kvmfault_file_source *source = new_source(&s);
	refuse_vm((void *)s.vcpu->handle, EBADF);
	refuse_vm((void *)source, EBADF);
	refuse_vcpu((void *)s.machine.library, EBADF);
	refuse_vcpu((void *)source, EBADF);
	refuse_fill((void *)s.machine.library, EBADF);
	kvmfault_fill_free((void *)s.machine.library);
	REFUSED(resolve_from(s.machine.library, s.machine.library, INTACT_VM_GPA), EBADF, "source");
	REFUSED(resolve_from(s.vcpu->handle, s.machine.library, INTACT_VM_GPA), EBADF, "source");
	kvmfault_vm_free((void *)s.vcpu->handle);
	kvmfault_vm_free((void *)source);
	kvmfault_vcpu_free((void *)s.machine.library);
	kvmfault_file_source_finalize(s.machine.library);
	OK(kvmfault_pages_state(s.machine.library, INTACT_VM_GPA));
	kvmfault_file_source_free(source);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void no_handles_at_all(void)
{
	static uint64_t zeros[64], ones[64];
	struct intact_vm s;
	intact_vm_create(&s);
	memset(ones, 0xff, sizeof(ones));
	void *const wrong[] = {
		zeros, ones,       (char *)zeros + 1, (char *)s.machine.library + 1, (char *)s.machine.library + 4,
		&s,    s.vcpu->run
	};
	for (size_t i = 0; i < sizeof(wrong) / sizeof(*wrong); i++) {
		refuse_vm(wrong[i], EBADF);
		refuse_vcpu(wrong[i], EBADF);
		refuse_fill(wrong[i], EBADF);
		kvmfault_fill_free(wrong[i]);
		REFUSED(resolve_from(wrong[i], s.machine.library, INTACT_VM_GPA), EBADF, "source");
		kvmfault_vm_free(wrong[i]);
		kvmfault_vcpu_free(wrong[i]);
		kvmfault_file_source_free(wrong[i]);
	}
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/*
 * A handle is freed by several threads at once, while others use it: one of them frees it, and
 * nothing crashes.
 */
static struct kvmfault_vm *shared;
static atomic_bool go;

static void *use_and_free(void *arg)
{
	bool frees = arg != NULL;
	while (!go)
		;
	for (int i = 0; i < 1000; i++) {
		int ret = kvmfault_vm_mechanism(shared);
		CHECK(ret > 0 || ret == -EBADF, "returned %d: %s", ret, kvmfault_last_error());
		if (frees && i == 100)
			kvmfault_vm_free(shared);
	}
	return NULL;
}

static void freed_by_many(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	for (unsigned round = 1; round <= scaled(50); round++) {
		struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
		pthread_t threads[4];
		options.kvm_fd = s.machine.kvm;
		options.vm_fd = s.machine.vm;
		options.resolver = source_resolve;
		options.finalizer = finalizer;
		options.mechanism = KVMFAULT_MECHANISM_USERFAULTFD; /* needs no probe */
		OK(kvmfault_vm_new(&options, &shared));
		go = false;
		for (long i = 0; i < 4; i++)
			EQUAL("pthread_create", pthread_create(&threads[i], NULL, use_and_free, (void *)(i % 2)), 0);
		go = true;
		for (int i = 0; i < 4; i++)
			pthread_join(threads[i], NULL);
		for (double end = now() + 5; now() < end && finalized < round;)
			usleep(100);
		EQUAL("calls of the finalizer", finalized, round);
	}
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static const struct test_case cases[] = {
	{ "null-handles", null_handles, false },
	{ "freed-vm", freed_vm, false },
	{ "freed-vcpu", freed_vcpu, false },
	{ "freed-source", freed_source, false },
	{ "freed-fill", freed_fill, false },
	{ "vcpu-of-a-freed-vm", vcpu_of_a_freed_vm, false },
	{ "handles-of-another-type", handles_of_another_type, false },
	{ "no-handles-at-all", no_handles_at_all, false },
	{ "freed-by-many", freed_by_many, false },
};
TEST_MAIN(cases)
