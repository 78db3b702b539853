/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What kvmfault_vcpu_new and the functions of vCPUs must refuse.
 */
#define _GNU_SOURCE
#include "intact_vm.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* A vCPU of the intact VM that has no handle yet. */
static int spare_vcpu(const struct intact_vm *s, int number)
{
	return SYS(ioctl(s->machine.vm, KVM_CREATE_VCPU, number));
}

static struct kvmfault_vcpu_options options_for(int fd)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	options.fd = fd;
	return options;
}

static sigset_t signals_blocked(void)
{
	sigset_t set;
	pthread_sigmask(SIG_SETMASK, NULL, &set);
	return set;
}

/* No handle, and the thread's signal mask is what it was. */
static void refuse(const struct intact_vm *s, const struct kvmfault_vcpu_options *options, int error, const char *words)
{
	struct kvmfault_vcpu *vcpu = (struct kvmfault_vcpu *)1;
	sigset_t before = signals_blocked(), after;
	REFUSED(kvmfault_vcpu_new(s->machine.library, options, &vcpu), error, words);
	CHECK(vcpu == NULL, "the handle is %p after an error", (void *)vcpu);
	after = signals_blocked();
	for (int signal = 1; signal < NSIG; signal++)
		CHECK(sigismember(&before, signal) == sigismember(&after, signal), "signal %d was blocked or unblocked",
		      signal);
}

static void accept(const struct intact_vm *s, const struct kvmfault_vcpu_options *options)
{
	struct kvmfault_vcpu *vcpu;
	OK(kvmfault_vcpu_new(s->machine.library, options, &vcpu));
	kvmfault_vcpu_free(vcpu);
}

static void null_arguments(void)
{
	struct intact_vm s;
	struct kvmfault_vcpu *vcpu = (struct kvmfault_vcpu *)1;
	intact_vm_create(&s);
	struct kvmfault_vcpu_options options = options_for(spare_vcpu(&s, 5));
	refuse(&s, NULL, EINVAL, "options");
	REFUSED(kvmfault_vcpu_new(s.machine.library, &options, NULL), EINVAL, "vcpu");
	REFUSED(kvmfault_vcpu_new(NULL, &options, &vcpu), EINVAL, "vm");
	CHECK(vcpu == NULL, "the handle is %p after an error", (void *)vcpu);
	REFUSED(kvmfault_vcpu_stats(s.vcpu->handle, NULL), EINVAL, "stats");
	REFUSED(kvmfault_vcpu_memory_error(s.vcpu->handle, NULL), EINVAL, "info");
	accept(&s, &options);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void wrong_descriptors(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	const struct {
		int fd, error;
	} cases[] = {
		{ -1, EBADF },
		{ INT_MIN, EBADF },
		{ INT_MAX, EBADF },
		{ closed_fd(), EBADF },
		{ s.machine.vm, EINVAL },
		{ s.machine.kvm, EINVAL },
		{ new_uffd(), EINVAL },
		{ s.ram.fd, EINVAL },
		{ s.vcpu->fd, EEXIST }, /* it has a handle */
		{ SYS(dup(s.vcpu->fd)), EEXIST },
	};
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct kvmfault_vcpu_options options = options_for(cases[i].fd);
		refuse(&s, &options, cases[i].error, "fd");
		intact_vm_check(&s);
	}

	struct kvmfault_vcpu_options options = options_for(spare_vcpu(&s, 9));
	accept(&s, &options);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void wrong_options(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	const struct kvmfault_vcpu_options good = options_for(spare_vcpu(&s, 5));
	struct kvmfault_vcpu_options options;

	for (const int *bad = (const int[]){ -1, 2, INT_MAX, INT_MIN, 0 }; *bad; bad++) {
		options = good;
		options.sigbus = *bad;
		refuse(&s, &options, EINVAL, "sigbus");
	}
	/* 32 and 33 are the C library's own. */
	for (const int *bad = (const int[]){ -1, 32, 33, 65, INT_MAX, INT_MIN, SIGKILL, SIGSTOP, SIGBUS, 0 }; *bad;
	     bad++) {
		options = good;
		options.kick_signal = *bad;
		refuse(&s, &options, EINVAL, "kick_signal");
	}
	options = good;
	options.sigbus = KVMFAULT_SIGBUS_BY_HANDLER;
	refuse(&s, &options, EINVAL, "kick_signal"); /* none given */
	options.kick_signal = SIGUSR2;
	refuse(&s, &options, EINVAL, "kick_signal"); /* without a handler */
	for (int bit = 1; bit < 32; bit++) {
		options = good;
		options.flags = 1u << bit;
		refuse(&s, &options, EINVAL, "flags");
	}
	options = good;
	options.run = (uint8_t *)s.vcpu->run + 8;
	refuse(&s, &options, EINVAL, "run");
	for (const size_t *bad = (const size_t[]){ 1, 8, 4097, SIZE_MAX, 0 }; *bad; bad++) {
		options = good;
		options.size = *bad;
		refuse(&s, &options, EINVAL, "options.size");
	}
	options = good;
	options.size = 0;
	refuse(&s, &options, EINVAL, "options.size");
	union {
		struct kvmfault_vcpu_options options;
		uint8_t bytes[256];
	} longer = { .bytes = { 0 } };
	longer.options = good;
	longer.options.size = sizeof(longer);
	accept(&s, &longer.options);
	longer.bytes[sizeof(longer) - 1] = 1;
	refuse(&s, &longer.options, E2BIG, "options.size");
	options = good;
	options.size = offsetof(struct kvmfault_vcpu_options, sigbus);
	options.sigbus = options.kick_signal = 12345;
	accept(&s, &options);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void memory_error_and_stats(void)
{
	union {
		struct kvmfault_memory_error_info info;
		struct kvmfault_stats stats;
		uint8_t bytes[4096];
	} u;
	struct intact_vm s;
	intact_vm_create(&s);
	memset(&u, 0xee, sizeof(u));
	u.info.size = sizeof(u.info);
	REFUSED(kvmfault_vcpu_memory_error(s.vcpu->handle, &u.info), ENODATA, "memory error");
	EQUAL("what follows the size", u.bytes[sizeof(size_t)], 0xee);

	EQUAL("reading a lost page", intact_vm_read(&s, 3), KVMFAULT_MEMORY_ERROR);
	for (size_t size = sizeof(size_t) + 1; size < sizeof(u.info) + 16; size++) {
		memset(&u, 0xee, sizeof(u));
		u.info.size = size;
		if (!size_accepted(kvmfault_vcpu_memory_error(s.vcpu->handle, &u.info), size, sizeof(u.info)))
			continue;
		EQUAL("the size", u.info.size, size);
		CHECK(u.bytes[size] == 0xee, "with size %zu more was written", size);
		for (size_t i = sizeof(u.info); i < size; i++)
			EQUAL("a byte with no meaning", u.bytes[i], 0);
	}
	EQUAL("gpa", u.info.gpa, INTACT_VM_GPA + 3 * PAGE);
	EQUAL("lost", u.info.lost, 1);
	for (const size_t *bad = (const size_t[]){ 1, 8, 4097, SIZE_MAX, 0 }; *bad; bad++) {
		u.info.size = *bad;
		REFUSED(kvmfault_vcpu_memory_error(s.vcpu->handle, &u.info), EINVAL, "info.size");
		REFUSED(kvmfault_vcpu_stats(s.vcpu->handle, &u.stats), EINVAL, "stats.size");
		REFUSED(kvmfault_vm_stats(s.machine.library, &u.stats), EINVAL, "stats.size");
	}
	for (size_t size = sizeof(size_t) + 1; size < sizeof(u.stats) + 16; size++) {
		memset(&u, 0xee, sizeof(u));
		u.stats.size = size;
		bool accepted = size_accepted(kvmfault_vm_stats(s.machine.library, &u.stats), size, sizeof(u.stats));
		EQUAL("accepted of a vCPU",
		      size_accepted(kvmfault_vcpu_stats(s.vcpu->handle, &u.stats), size, sizeof(u.stats)), accepted);
		CHECK(u.stats.size == size && u.bytes[size] == 0xee, "with size %zu more was written", size);
	}
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

/* What a VMM with its own loop may pass by mistake: values that are no result of KVM_RUN. */
static void wrong_results(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	for (const int *ret = (const int[]){ INT_MIN, INT_MIN + 1, -4096, -4095, -ENOSYS, INT_MAX, 0 }; *ret; ret++) {
		s.vcpu->run->exit_reason = KVM_EXIT_UNKNOWN;
		int got = kvmfault_vcpu_handle_exit(s.vcpu->handle, *ret);
		CHECK(got == KVMFAULT_PASS, "handle_exit(%d) returned %d: %s", *ret, got, kvmfault_last_error());
		intact_vm_check(&s);
	}
	/*
	 * A SIGBUS that isn't KVM's. With SIGBUS by mask no VMM calls this, but the call must do no
	 * harm.
	 */
	EQUAL("on_sigbus(BUS_ADRALN)", kvmfault_vcpu_on_sigbus(s.vcpu->handle, BUS_ADRALN, NULL), 0);
	EQUAL("on_sigbus(BUS_MCEERR_AO)", kvmfault_vcpu_on_sigbus(s.vcpu->handle, BUS_MCEERR_AO, s.ram.hva), 0);
	EQUAL("on_sigbus(INT_MIN)", kvmfault_vcpu_on_sigbus(s.vcpu->handle, INT_MIN, (void *)-1l), 0);
	/*
	 * The same before the first has been seen: not KVM's, but of a thread that touches broken
	 * memory again and again.
	 */
	EQUAL("on_sigbus", kvmfault_vcpu_on_sigbus(s.vcpu->handle, BUS_MCEERR_AR, s.ram.hva), 1);
	EQUAL("the same again", kvmfault_vcpu_on_sigbus(s.vcpu->handle, BUS_MCEERR_AR, s.ram.hva), 0);
	EQUAL("another", kvmfault_vcpu_on_sigbus(s.vcpu->handle, BUS_MCEERR_AR, s.ram.hva + PAGE), 1);
	/* An exit for something else forgets it; what is broken comes again. */
	s.vcpu->run->exit_reason = KVM_EXIT_HLT;
	EQUAL("an exit", kvmfault_vcpu_handle_exit(s.vcpu->handle, 0), KVMFAULT_PASS);
	EQUAL("the same after an exit", kvmfault_vcpu_on_sigbus(s.vcpu->handle, BUS_MCEERR_AR, s.ram.hva + PAGE), 1);
	EQUAL("an exit", kvmfault_vcpu_handle_exit(s.vcpu->handle, 0), KVMFAULT_PASS);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static void *run_for_ever(struct vcpu *v)
{
	vcpu_attach(v);
	int ret = kvmfault_vcpu_run(v->handle);
	CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
	vcpu_detach(v);
	return NULL;
}

/* A vCPU belongs to one thread at a time. */
static void used_by_two_threads(void)
{
	struct intact_vm s;
	intact_vm_create(&s);
	struct vcpu *busy = machine_add_vcpu(&s.machine, 3);
	uint64_t gpa;
	struct step *loop = machine_share(&s.machine, PAGE, &gpa);
	_Atomic uint64_t *runs = (_Atomic uint64_t *)((uint8_t *)loop + PAGE / 2);
	loop[0] = (struct step){ .operation = WRITE64, .address = gpa + PAGE / 2, .value = 1 };
	loop[1] = (struct step){ .operation = JUMP, .address = gpa };
	vcpu_load_script(busy, gpa);
	vcpu_start(busy, run_for_ever, NULL);
	UNTIL(*runs); /* the guest itself says that its thread is inside */
	REFUSED(kvmfault_vcpu_run(busy->handle), EBUSY, "vCPU");
	REFUSED(kvmfault_vcpu_resume(busy->handle), EBUSY, "vCPU");
	REFUSED(kvmfault_vcpu_handle_exit(busy->handle, 0), EBUSY, "vCPU");
	intact_vm_check(&s);
	OK(kvmfault_vcpu_kick(busy->handle));
	vcpu_join(busy);
	intact_vm_check(&s);
	intact_vm_destroy(&s);
}

static const struct test_case cases[] = {
	{ "null-arguments", null_arguments, false }, { "wrong-descriptors", wrong_descriptors, false },
	{ "wrong-options", wrong_options, false },   { "memory-error-and-stats", memory_error_and_stats, false },
	{ "wrong-results", wrong_results, false },   { "used-by-two-threads", used_by_two_threads, false },
};
TEST_MAIN(cases)
