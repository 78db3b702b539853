/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static void set_mode(struct vcpu *v)
{
	struct kvm_sregs s;
	struct kvm_segment code = {
		.limit = 0xfffff,
		.selector = v->cpl ? 0x33 : 0x10,
		.type = 11,
		.present = 1,
		.dpl = v->cpl,
		.s = 1,
		.l = 1,
		.g = 1,
	};
	struct kvm_segment data = {
		.limit = 0xfffff,
		.selector = v->cpl ? 0x2b : 0x18,
		.type = 3,
		.present = 1,
		.dpl = v->cpl,
		.s = 1,
		.db = 1,
		.g = 1,
	};
	SYS(ioctl(v->fd, KVM_GET_SREGS, &s));
	s.cs = code;
	s.ds = s.es = s.fs = s.gs = s.ss = data;
	memset(&s.ldt, 0, sizeof(s.ldt));
	s.tr.present = 1;
	s.tr.type = 11;
	s.cr3 = LOW_PAGE_TABLES;
	s.cr4 = 0x620; /* PAE, and SSE as the operating system allows it */
	s.cr0 = 0x80050033;
	s.efer = 0xd01;
	SYS(ioctl(v->fd, KVM_SET_SREGS, &s));
}

struct vcpu *machine_add_vcpu(struct machine *m, int cpl)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid;
	CHECK(m->vcpus < MOST_VCPUS, "too many vCPUs");
	struct vcpu *v = calloc(1, sizeof(*v));
	CHECK(v, "no memory");
	v->machine = m;
	v->number = (int)m->vcpus;
	v->cpl = cpl;
	v->fd = SYS(ioctl(m->vm, KVM_CREATE_VCPU, v->number));
	v->run =
		mmap(NULL, SYS(ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0)), PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	CHECK(v->run != MAP_FAILED, "kvm_run: %s", strerror(errno));
	cpuid.head.nent = 256;
	SYS(ioctl(m->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
	SYS(ioctl(v->fd, KVM_SET_CPUID2, &cpuid));
	set_mode(v);
	machine_share(m, PAGE, &v->stack);
	m->vcpu[m->vcpus++] = v;
	return v;
}

void vcpu_attach(struct vcpu *v)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	options.fd = v->fd;
	options.run = v->run;
	OK(kvmfault_vcpu_new(v->machine->library, &options, &v->handle));
}

/* The vCPU of this thread: SIGBUS comes to the thread that touched the memory. */
static _Thread_local struct vcpu *attached;

static void on_kick(int signal)
{
	(void)signal;
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	if (!attached || kvmfault_vcpu_on_sigbus(attached->handle, info->si_code, info->si_addr) != 1)
		_exit(99);
}

void vcpu_attach_by_handler(struct vcpu *v, uint32_t flags)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	struct sigaction kick = { .sa_handler = on_kick };
	struct sigaction bus = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	SYS(sigaction(SIGUSR1, &kick, NULL));
	SYS(sigaction(SIGBUS, &bus, NULL));
	attached = v;
	options.fd = v->fd;
	options.run = v->run;
	options.flags = flags;
	options.sigbus = KVMFAULT_SIGBUS_BY_HANDLER;
	options.kick_signal = SIGUSR1;
	OK(kvmfault_vcpu_new(v->machine->library, &options, &v->handle));
}

void vcpu_detach(struct vcpu *v)
{
	kvmfault_vcpu_free(v->handle);
	v->handle = NULL;
}

bool vcpu_stopped(const struct vcpu *v, uint32_t *value)
{
	if (v->run->exit_reason != KVM_EXIT_IO || v->run->io.port != STOP_PORT)
		return false;
	memcpy(value, (uint8_t *)v->run + v->run->io.data_offset, sizeof(*value));
	return true;
}

const char *vcpu_describe(const struct vcpu *v, int ret)
{
	static _Thread_local char text[512];
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	struct kvm_regs regs;
	unsigned long long rip = ioctl(v->fd, KVM_GET_REGS, &regs) ? 0 : regs.rip;
	if (ret < 0)
		snprintf(text, sizeof(text), "vCPU %d at %#llx: %s (%s)", v->number, rip, strerror(-ret),
			 kvmfault_last_error());
	else if (ret == KVMFAULT_MEMORY_ERROR && !kvmfault_vcpu_memory_error(v->handle, &info))
		snprintf(text, sizeof(text), "vCPU %d: memory error at gpa %#llx, lost %d", v->number,
			 (unsigned long long)info.gpa, info.lost);
	else if (v->run->exit_reason == KVM_EXIT_MMIO)
		snprintf(text, sizeof(text), "vCPU %d at %#llx: returned %d, MMIO exit at %#llx, %u bytes, write %u",
			 v->number, rip, ret, v->run->mmio.phys_addr, v->run->mmio.len, v->run->mmio.is_write);
	else if (v->run->exit_reason == KVM_EXIT_INTERNAL_ERROR)
		snprintf(text, sizeof(text), "vCPU %d at %#llx: returned %d, internal error %u", v->number, rip, ret,
			 v->run->internal.suberror);
	else
		snprintf(text, sizeof(text), "vCPU %d at %#llx: returned %d, exit reason %u", v->number, rip, ret,
			 v->run->exit_reason);
	return text;
}

uint32_t vcpu_run(struct vcpu *v)
{
	uint32_t value;
	int ret;
	do
		ret = kvmfault_vcpu_run(v->handle);
	while (ret == KVMFAULT_INTERRUPTED);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	return value;
}

static void *vcpu_thread(void *arg)
{
	struct vcpu *v = arg;
	return v->main(v);
}

void vcpu_start(struct vcpu *v, void *(*main)(struct vcpu *), void *opaque)
{
	v->main = main;
	v->opaque = opaque;
	int error = pthread_create(&v->thread, NULL, vcpu_thread, v);
	CHECK(!error, "pthread_create: %s", strerror(error));
}

void vcpu_join(struct vcpu *v)
{
	pthread_join(v->thread, NULL);
}
