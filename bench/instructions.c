/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Serves so many faults as a VMM with a loop of its own does, without ever running a guest: SIGBUS
 * is said to have come, and KVM_RUN to have been interrupted by it. Under callgrind this counts the
 * instructions of the library, the resolver's call of it included (bench/instructions).
 */
#define _GNU_SOURCE
#include "ways.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	int ret = kvmfault_pages_install(vm, fault->window_gpa, source_bytes, fault->window_len);
	return ret < 0 ? ret : KVMFAULT_RESOLVED;
}

static void on_kick(int signal)
{
	(void)signal;
}

/* What callgrind counts. */
__attribute__((noinline)) void serve(struct kvmfault_vcpu *vcpu, void *address)
{
	EQUAL("on_sigbus", kvmfault_vcpu_on_sigbus(vcpu, BUS_MCEERR_AR, address), 1);
	EQUAL("handle_exit", kvmfault_vcpu_handle_exit(vcpu, -EINTR), KVMFAULT_HANDLED);
}

int main(int argc, char **argv)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vcpu_options vcpu_options = KVMFAULT_VCPU_OPTIONS_INIT;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	struct machine m;
	struct ram ram;
	if (argc != 4 || (strcmp(argv[1], "anon") && strcmp(argv[1], "memfd"))) {
		fprintf(stderr, "usage: instructions anon|memfd READAHEAD PAGES\n");
		return 2;
	}
	uint64_t pages = strtoul(argv[3], NULL, 10);
	options.readahead = (uint32_t)strtoul(argv[2], NULL, 10);
	ram_create(&ram, strcmp(argv[1], "anon") ? MEMFD : ANON, pages * PAGE);
	machine_create(&m, PAGE);
	options.mechanism = KVMFAULT_MECHANISM_POISON_TRAP;
	options.resolver = resolve;
	machine_attach(&m, NULL, &options);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	OK(kvmfault_memslot_prepare(m.library, &slot, &region));
	struct vcpu *v = machine_add_vcpu(&m, 3);
	SYS(sigaction(SIGUSR1, &(struct sigaction){ .sa_handler = on_kick }, NULL));
	vcpu_options.fd = v->fd;
	vcpu_options.run = v->run;
	vcpu_options.sigbus = KVMFAULT_SIGBUS_BY_HANDLER;
	vcpu_options.kick_signal = SIGUSR1;
	OK(kvmfault_vcpu_new(m.library, &vcpu_options, &v->handle));
	unsigned long faults = 0;
	for (uint64_t page = 0; page < pages; page++) {
		if (kvmfault_pages_state(m.library, RAM_GPA + page * PAGE) == KVMFAULT_PAGE_ABSENT) {
			serve(v->handle, (uint8_t *)region.userspace_addr + page * PAGE);
			faults++;
		}
	}
	EQUAL("absent pages", kvmfault_pages_absent(m.library), 0);
	printf("%lu faults\n", faults);
	return 0;
}
