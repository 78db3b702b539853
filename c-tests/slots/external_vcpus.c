/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * vCPUs beside a post-copy of the VMM's own (postcopy_vmm.h): kicked by the handler of the kick
 * signal while they wait, and asking for pages that KVM itself is about to need.
 */
#define _GNU_SOURCE
#include "postcopy_vmm.h"

#include <errno.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* ---- a kick by the handler of the kick signal, as QEMU's ---- */

static _Thread_local struct vcpu *current;
static atomic_uint signals;

static void on_kick(int signal)
{
	(void)signal;
	signals++;
	if (current && kvmfault_vcpu_kick(current->handle))
		_exit(98);
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	if (!current || kvmfault_vcpu_on_sigbus(current->handle, info->si_code, info->si_addr) != 1)
		_exit(99);
}

static atomic_uint interrupted, done;

static void *own_loop(struct vcpu *v)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	uint32_t value;
	int ret;
	current = v;
	options.fd = v->fd;
	options.run = v->run;
	options.flags = KVMFAULT_VCPU_RESUMES;
	options.sigbus = KVMFAULT_SIGBUS_BY_HANDLER;
	options.kick_signal = SIGUSR1;
	OK(kvmfault_vcpu_new(v->machine->library, &options, &v->handle));
	for (;;) {
		ret = kvmfault_vcpu_resume(v->handle);
		if (ret == KVMFAULT_HANDLED)
			ret = kvmfault_vcpu_handle_exit(v->handle, ioctl(v->fd, KVM_RUN, 0));
		if (ret == KVMFAULT_INTERRUPTED)
			interrupted++;
		else if (ret != KVMFAULT_HANDLED)
			break;
	}
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	EQUAL("the guest's verdict", value, 0);
	done++;
	return NULL;
}

/* The signal alone ends each wait, in time and once; no kick follows from it. */
static void kick_in_handler(void)
{
	struct sigaction kick = { .sa_handler = on_kick };
	struct sigaction bus = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	double slowest = 0;
	enum { KICKS = 200 };
	SYS(sigaction(SIGUSR1, &kick, NULL));
	SYS(sigaction(SIGBUS, &bus, NULL));
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		postcopy_vmm_set_up(MEMFD, false);
		signals = interrupted = done = 0;
		postcopy_vmm.list[0] = PAGES - 1; /* missing */
		struct vcpu *v = machine_add_vcpu(&postcopy_vmm.m, cpl);
		vcpu_load_verify(v, RAM_GPA, postcopy_vmm.list_gpa, 1, &postcopy_vmm.source.pattern, READ_FIRST);
		vcpu_start(v, own_loop, NULL);
		UNTIL(postcopy_vmm.calls == 1);
		for (unsigned i = 0; i < KICKS; i++) {
			double began = now();
			CHECK(!pthread_kill(v->thread, SIGUSR1), "pthread_kill");
			UNTIL(interrupted > i);
			slowest = now() - began > slowest ? now() - began : slowest;
		}
		usleep(50000);
		EQUAL("signals", signals, KICKS);
		EQUAL("INTERRUPTED", interrupted, KICKS);
		postcopy_vmm.paused = false;
		UNTIL(done);
		vcpu_join(v);
		postcopy_vmm_tear_down();
	}
	note("slowest of %d: %.1f ms", 2 * KICKS, slowest * 1e3);
}

/* ---- pages that KVM itself needs ---- */

static atomic_int last;

/* The vCPU's thread before its first KVM_RUN, as a VMM's is with the clock page of its guest. */
static void *resolve_main(struct vcpu *v)
{
	int ret;
	vcpu_attach(v);
	const uint64_t border = RAM_GPA + (PAGES - 1) * PAGE;
	REFUSED(kvmfault_vcpu_resolve(v->handle, border, 0), EINVAL, "len");
	REFUSED(kvmfault_vcpu_resolve(v->handle, border, -border), EINVAL, "len");
	REFUSED(kvmfault_vcpu_resolve(v->handle, RAM_GPA - 1, 1), ENOENT, "gpa");
	EQUAL("present pages", kvmfault_vcpu_resolve(v->handle, RAM_GPA + PAGE + 5, 2 * PAGE), KVMFAULT_HANDLED);
	EQUAL("resolver calls for present pages", postcopy_vmm.calls, 0);
	while ((ret = kvmfault_vcpu_resolve(v->handle, border - 8, 16)) == KVMFAULT_INTERRUPTED)
		interrupted++;
	last = ret;
	done++;
	vcpu_detach(v);
	return NULL;
}

static void resolve_by_vcpu(void)
{
	postcopy_vmm_set_up(MEMFD, false);
	done = interrupted = 0;
	struct vcpu *v = machine_add_vcpu(&postcopy_vmm.m, 3);
	vcpu_start(v, resolve_main, NULL);
	UNTIL(postcopy_vmm.calls == 1);
	for (unsigned i = 0; i < 10; i++) {
		OK(kvmfault_vcpu_kick(v->handle));
		UNTIL(interrupted == i + 1);
	}
	postcopy_vmm_place(PAGES - 2);
	UNTIL(postcopy_vmm.calls == 2); /* the other page that the range touches */
	EQUAL("done with one page of two", done, 0);
	postcopy_vmm_place(PAGES - 1);
	UNTIL(done);
	EQUAL("vcpu_resolve", last, KVMFAULT_HANDLED);
	vcpu_join(v);
	REFUSED(kvmfault_vcpu_resolve(NULL, RAM_GPA, 1), EINVAL, "vcpu");
	postcopy_vmm_tear_down();
}

static const struct test_case cases[] = {
	{ "kick-in-handler", kick_in_handler, true },
	{ "resolve-by-vcpu", resolve_by_vcpu, true },
};
TEST_MAIN(cases)
