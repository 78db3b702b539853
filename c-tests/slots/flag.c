/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The memslot flag: recognised by its behaviour alone; faults are served on the vCPU's thread; a
 * VMM with ioctls of its own learns what to pass to KVM. Cases that are not about the flag run with
 * each mechanism.
 */
#define _GNU_SOURCE
#include "abi.h"
#include "slot_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/time.h>
#include <unistd.h>

#define CAP_PRE_FAULT_MEMORY 236 /* v7's EXIT_ON_MISSING, too */

/* ---- recognising it ---- */

static int open_kvm(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		skip("/dev/kvm: %s", strerror(errno));
	return kvm;
}

static atomic_ulong alarms;

static void on_alarm(int signal)
{
	(void)signal;
	alarms++;
}

/* Signals interrupt whatever can be interrupted, as a VMM's timers do. */
static void set_alarms(bool on)
{
	struct sigaction action = { .sa_handler = on_alarm };
	struct itimerval every = { { 0, on ? 1000 : 0 }, { 0, on ? 1000 : 0 } };
	SYS(sigaction(SIGALRM, &action, NULL));
	SYS(setitimer(ITIMER_REAL, &every, NULL));
}

/*
 * The probe finds the kernel's ABI without a hint, or finds none; and what it reports can be used.
 */
static void recognised(void)
{
	const struct abi *abi = expected_abi();
	const char *name = abi ? abi->name : "";
	int kvm = open_kvm();
	for (int i = 0; i < 10; i++) {
		set_alarms(i > 1);
		struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
		uint32_t bit = 1u << KVMFAULT_MECHANISM_MEMSLOT_FLAG, expected = abi ? bit : 0;
		OK(kvmfault_probe(i % 2 ? -1 : kvm, &probe));
		CHECK(!strcmp(probe.abi, name), "kvmfault_probe.abi is \"%s\", not \"%s\" (kvm.fault_abi is \"%s\")",
		      probe.abi, name, fault_abi());
		EQUAL("memslot-flag for anonymous memory", probe.mechanisms_anon & bit, expected);
		EQUAL("memslot-flag for shared memory", probe.mechanisms_shared & bit, expected);
		EQUAL("memslot-flag for hugetlb memory", probe.mechanisms_hugetlb & bit, expected);
	}
	set_alarms(false);
	note("KVM's ABI: %s; %lu signals", abi ? name : "none", (unsigned long)alarms);
}

static char *explanation(int kvm)
{
	int length = (int)OK(kvmfault_explain(kvm, NULL, 0));
	char *text = malloc(length + 1);
	CHECK(text, "no memory");
	EQUAL("length of the explanation", kvmfault_explain(kvm, text, length + 1), length);
	return text;
}

/* The line of the explanation that tells of a row; NULL if none does. */
static const char *line_of(char *text, const char *row)
{
	for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
		const char *start = line + strspn(line, " ");
		size_t length = strlen(row);
		if (start > line && !strncmp(start, row, length) && start[length] == ' ' && strstr(start, ": "))
			return start;
	}
	return NULL;
}

/* Capability numbers and accepted flags that mean something else, or nothing, are not believed. */
static void false_friends(void)
{
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	int kvm = open_kvm();
	bool friendly = !strcmp(fault_abi(), "falsefriend");
	if (expected_abi())
		skip("this kernel's KVM has the flag");
	if (!friendly && ioctl(kvm, KVM_CHECK_EXTENSION, CAP_PRE_FAULT_MEMORY) <= 0)
		skip("this KVM reports none of the flag's capability numbers");
	OK(kvmfault_probe(kvm, &probe));
	CHECK(!*probe.abi, "\"%s\" was believed", probe.abi);
	for (const struct abi *abi = abis; abi < abis + ABIS; abi++) {
		char *text = explanation(kvm);
		const char *line = line_of(text, abi->name);
		CHECK(line && strstr(line, ": no: "), "the explanation of %s: %s", abi->name, line ? line : "none");
		/*
		 * v2 has a mask to enable, of which the false friend takes all; mainline's 236
		 * makes v7 worth a try.
		 */
		if (friendly && strcmp(abi->name, "v7") != 0)
			CHECK(strstr(line, "accepted, but") || strstr(line, "does not exit"), "the explanation: %s",
			      line);
		if (!friendly && !strcmp(abi->name, "v7"))
			CHECK(strstr(line, "a memslot with flag 0x8"), "the explanation: %s", line);
		printf("%s\n", line);
		free(text);
	}
}

/*
 * Without the flag, forcing it fails with a reason, and not forcing it gives something else that
 * works.
 */
static void absent(void)
{
	struct machine m;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vm *vm;
	if (expected_abi())
		skip("this kernel's KVM has the flag");
	machine_create(&m, 0);
	options.kvm_fd = m.kvm;
	options.vm_fd = m.vm;
	options.resolver = slot_vm_resolve;
	options.mechanism = KVMFAULT_MECHANISM_MEMSLOT_FLAG;
	REFUSED(kvmfault_vm_new(&options, &vm), EOPNOTSUPP, "memslot-flag");
	CHECK(!vm, "a handle comes with the error");
	machine_destroy(&m);

	struct slot_vm s;
	slot_vm_attach(&s, MEMFD, 64 * PAGE, KVMFAULT_MECHANISM_AUTO, NULL);
	CHECK(kvmfault_vm_mechanism(s.m.library) != KVMFAULT_MECHANISM_MEMSLOT_FLAG, "auto took the flag");
	machine_set_slot(&s.m, &s.ram, RAM_SLOT, RAM_GPA);
	slot_vm_visit(&s, slot_vm_add_vcpu(&s, 3), 0, s.pages, READ_FIRST);
	slot_vm_destroy(&s);
}

/* kvmfault_vm_options.abi: the right name works, any other is tried, and refused with its name. */
static void named(void)
{
	const struct abi *right = expected_abi();
	for (const struct abi *abi = abis; abi < abis + ABIS; abi++) {
		if (abi == right) {
			struct slot_vm s;
			slot_vm_attach(&s, ANON, 64 * PAGE, KVMFAULT_MECHANISM_MEMSLOT_FLAG, abi->name);
			machine_set_slot(&s.m, &s.ram, RAM_SLOT, RAM_GPA);
			slot_vm_visit(&s, slot_vm_add_vcpu(&s, 0), 0, s.pages, READ_FIRST);
			EQUAL("resolver calls on the vCPU's thread", s.here, s.pages);
			vcpu_detach(s.m.vcpu[0]);
			slot_vm_destroy(&s);
			continue;
		}
		for (int mechanism = KVMFAULT_MECHANISM_AUTO; mechanism <= KVMFAULT_MECHANISM_MEMSLOT_FLAG;
		     mechanism++) {
			struct machine m;
			struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
			struct kvmfault_vm *vm;
			machine_create(&m, 0);
			options.kvm_fd = m.kvm;
			options.vm_fd = m.vm;
			options.resolver = slot_vm_resolve;
			options.mechanism = mechanism;
			options.abi = abi->name;
			REFUSED(kvmfault_vm_new(&options, &vm), EOPNOTSUPP, abi->name);
			options.abi = "v0";
			REFUSED(kvmfault_vm_new(&options, &vm), EINVAL, "v0");
			machine_destroy(&m);
		}
	}
}

/* ---- on from the start ---- */

/*
 * The resolver runs on the faulting vCPU's thread (with `userfaultfd`, on none of them), for reads
 * and writes, in both rings.
 */
static void on_thread(enum backing backing)
{
	bool uffd = test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD;
	for (int mode = READ_FIRST; mode <= WRITE_FIRST; mode++) {
		struct slot_vm s;
		slot_vm_create(&s, backing, backing == HUGETLB ? 4 * HUGE_PAGE : 2ul << 20, 0, 0);
		list_shuffle(s.list, s.pages, 7);
		struct vcpu *ring3 = slot_vm_add_vcpu(&s, 3);
		slot_vm_visit(&s, ring3, 0, s.pages / 2, mode);
		vcpu_detach(ring3);
		struct vcpu *ring0 = slot_vm_add_vcpu(&s, 0);
		slot_vm_visit(&s, ring0, s.pages / 2, s.pages - s.pages / 2, mode);
		vcpu_detach(ring0);
		unsigned long calls = s.ram.len / s.ram.page;
		/*
		 * Where CPL 0 is emulated, reads of it with userfaultfd and writes come by KVM's
		 * copy_from_user: still no MMIO.
		 */
		EQUAL("resolver calls on the vCPU's thread", s.here, uffd ? 0 : calls);
		EQUAL("resolver calls elsewhere", s.elsewhere, uffd ? calls : 0);
		slot_vm_expect_all_present(&s);
		slot_vm_destroy(&s);
	}
}

static void on_thread_anon(void)
{
	on_thread(ANON);
}

static void on_thread_memfd(void)
{
	on_thread(MEMFD);
}

static void on_thread_hugetlb(void)
{
	on_thread(HUGETLB);
}

/* What the flag's ABI reports of the access reaches the resolver, and nothing false does. */
struct access_seen {
	struct source *source;
	uint32_t access;
};

static int access_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct access_seen *seen = opaque;
	seen->access = fault->access;
	return source_resolve(seen->source, vm, fault);
}

static void access_told(void)
{
	static const uint8_t ret = 0xc3;
	const struct abi *abi = require_flag();
	bool some = !strcmp(abi->name, "v4") || !strcmp(abi->name, "v7"), reads = !strcmp(abi->name, "v7");
	struct slot_vm s;
	struct access_seen seen = { &s.source, 0 };
	slot_vm_attach(&s, ANON, 128 * PAGE, KVMFAULT_MECHANISM_MEMSLOT_FLAG, NULL);
	kvmfault_vm_free(s.m.library);
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.mechanism = KVMFAULT_MECHANISM_MEMSLOT_FLAG;
	options.resolver = access_resolve;
	options.opaque = &seen;
	machine_attach(&s.m, &s.source, &options);
	machine_set_slot(&s.m, &s.ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = slot_vm_add_vcpu(&s, 0);
	slot_vm_read(&s, v, RAM_GPA);
	EQUAL("access of a read", seen.access, reads ? KVMFAULT_ACCESS_READ : 0);
	slot_vm_write(&s, v, RAM_GPA + PAGE, 1);
	EQUAL("access of a write", seen.access, some ? KVMFAULT_ACCESS_WRITE : 0);
	/* A page that begins with a `ret`, by the pattern. */
	uint64_t page = 2;
	while (page < s.pages && (uint8_t)pattern_word(&s.source.pattern, page, 0) != ret)
		page++;
	CHECK(page < s.pages, "no page of the pattern begins with a `ret`");
	slot_vm_step(&s, v, (struct step){ CALL, RAM_GPA + page * PAGE, 0, 0 });
	vcpu_run(v);
	EQUAL("access of an instruction fetch", seen.access, some ? KVMFAULT_ACCESS_EXEC : 0);
	slot_vm_destroy(&s);
}

/*
 * A VM ends and the next one begins at the same addresses: a reader thread of the first, on its way
 * out, doesn't touch the second.
 */
static void next_vm(void)
{
	unsigned long rounds = scaled(24);
	uint8_t *last = NULL;
	unsigned same = 0;
	for (unsigned long round = 0; round < rounds; round++) {
		struct slot_vm s;
		slot_vm_create(&s, round % 2 ? MEMFD : ANON, 16 * PAGE, 0, 0);
		same += s.ram.hva == last;
		last = s.ram.hva;
		slot_vm_visit(&s, slot_vm_add_vcpu(&s, 3), 0, s.pages, READ_FIRST);
		slot_vm_destroy(&s);
	}
	printf("%lu VMs, %u at the addresses of the one before\n", rounds, same);
}

/* ---- a VMM's own loop and ioctls ---- */

/*
 * KVM_RUN's errno at a fault is the ABI's (v2's is EPERM, so that -errno is -1), and handle_exit
 * takes it in either way.
 */
static void run_errno(void)
{
	const struct abi *abi = require_flag();
	for (int by_errno = 0; by_errno < 2; by_errno++) {
		struct slot_vm s;
		uint32_t value;
		unsigned long failures = 0;
		slot_vm_attach(&s, MEMFD, 128 * PAGE, KVMFAULT_MECHANISM_MEMSLOT_FLAG, NULL);
		machine_set_slot(&s.m, &s.ram, RAM_SLOT, RAM_GPA);
		struct vcpu *v = slot_vm_add_vcpu(&s, 0);
		vcpu_load_verify(v, RAM_GPA, s.list_gpa, s.pages, &s.source.pattern, READ_FIRST);
		for (;;) {
			int ret = ioctl(v->fd, KVM_RUN, 0), error = errno;
			if (ret < 0) {
				EQUAL("KVM_RUN's errno", error, abi->run_errno);
				failures++;
			}
			errno = error;
			ret = kvmfault_vcpu_handle_exit(v->handle, ret < 0 && !by_errno ? -error : ret);
			if (ret == KVMFAULT_HANDLED)
				continue;
			CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value) && value == 0, "%s",
			      vcpu_describe(v, ret));
			break;
		}
		EQUAL("failures of KVM_RUN", failures, s.pages);
		EQUAL("resolver calls on the vCPU's thread", s.here, s.pages);
		/*
		 * The same errno without an exit of that kind is the VMM's: a stale exit is no
		 * fault.
		 */
		unsigned long calls = s.source.total;
		errno = EPERM; /* -EPERM is -1, which means errno */
		EQUAL("EPERM without a fault", kvmfault_vcpu_handle_exit(v->handle, -EPERM), KVMFAULT_PASS);
		EQUAL("resolver calls", s.source.total, calls);
		vcpu_detach(v);
		slot_vm_destroy(&s);
	}
}

/* kvmfault_memslot_prepare describes the ioctl; the VMM makes it. */
static void prepared(void)
{
	const struct abi *abi = require_flag();
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct slot_vm s;
		struct kvmfault_region region = KVMFAULT_REGION_INIT, logged = KVMFAULT_REGION_INIT;
		slot_vm_attach(&s, backing, 256 * PAGE, KVMFAULT_MECHANISM_MEMSLOT_FLAG, NULL);
		OK(kvmfault_vm_enable(s.m.library, KVMFAULT_CAP_FAULT_EXITS));
		struct kvmfault_memslot slot = slot_on(&s.ram, RAM_SLOT, RAM_GPA);
		OK(kvmfault_memslot_prepare(s.m.library, &slot, &region));
		EQUAL("ioctl_version", region.ioctl_version, abi->ioctl_version);
		EQUAL("slot", region.slot, RAM_SLOT);
		EQUAL("flags", region.flags, abi->flag);
		EQUAL("guest_phys_addr", region.guest_phys_addr, RAM_GPA);
		EQUAL("memory_size", region.memory_size, s.ram.len);
		EQUAL("userspace_addr", region.userspace_addr, (uintptr_t)s.ram.hva);
		EQUAL("there is a bitmap", region.userfault_bitmap != 0, abi->bitmap);
		machine_set_region(&s.m, &region);
		struct vcpu *v = slot_vm_add_vcpu(&s, 3);
		slot_vm_visit(&s, v, 0, 64, READ_FIRST);
		EQUAL("resolver calls on the vCPU's thread", s.here, 64);
		if (abi->bitmap) {
			uint64_t *bits = (uint64_t *)(uintptr_t)region.userfault_bitmap;
			EQUAL("bits of present pages", bits[0], 0);
			EQUAL("bits of absent pages", bits[1], -1);
		}

		/* Logging on; the flag off and on by the library; logging off. */
		slot.kvm_flags = KVM_MEM_LOG_DIRTY_PAGES;
		OK(kvmfault_memslot_prepare(s.m.library, &slot, &logged));
		EQUAL("flags", logged.flags, abi->flag | KVM_MEM_LOG_DIRTY_PAGES);
		EQUAL("the bitmap is the same", logged.userfault_bitmap, region.userfault_bitmap);
		machine_set_region(&s.m, &logged);
		slot_vm_visit(&s, v, 64, 64, WRITE_FIRST);
		EQUAL("resolver calls on the vCPU's thread", s.here, 128);
		OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 0));
		slot_vm_visit(&s, v, 128, 32, WRITE_FIRST);
		EQUAL("resolver calls on reader threads", s.elsewhere, 32);
		uint64_t log[256 / 64];
		slot_vm_dirty_log(&s, log);
		CHECK(log[1] == ~0ul && log[2] == 0xffffffff && log[3] == 0, "the log is %#lx %#lx %#lx %#lx", log[0],
		      log[1], log[2], log[3]);
		OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 1));
		slot_vm_visit(&s, v, 160, 32, READ_FIRST);
		slot.kvm_flags = 0;
		OK(kvmfault_memslot_prepare(s.m.library, &slot, &logged));
		EQUAL("flags", logged.flags, abi->flag);
		machine_set_region(&s.m, &logged);
		slot_vm_visit(&s, v, 192, 64, READ_FIRST);
		EQUAL("resolver calls on the vCPU's thread", s.here, 256 - 32);

		/* Deleted: first KVM, then the library. */
		slot.len = 0;
		region.memory_size = 0;
		region.flags = 0;
		machine_set_region(&s.m, &region);
		OK(kvmfault_memslot_prepare(s.m.library, &slot, &region));
		EQUAL("memory_size", region.memory_size, 0);
		vcpu_detach(v);
		slot_vm_destroy(&s);
	}
}

/* With and without KVM_PRE_FAULT_MEMORY, which the flag must not be confused by. */
static void pre_fault(void)
{
	require_flag();
	for (int off = 0; off < 2; off++) {
		for (int backing = ANON; backing <= MEMFD; backing++) {
			struct slot_vm s;
			slot_vm_attach(&s, backing, 512 * PAGE, KVMFAULT_MECHANISM_MEMSLOT_FLAG, NULL);
			kvmfault_vm_free(s.m.library);
			struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
			options.mechanism = KVMFAULT_MECHANISM_MEMSLOT_FLAG;
			options.flags = off ? 0 : KVMFAULT_VM_PRE_FAULT;
			options.readahead = 8;
			s.source.window = true;
			machine_attach(&s.m, &s.source, &options);
			machine_set_slot(&s.m, &s.ram, RAM_SLOT, RAM_GPA);
			struct vcpu *v = slot_vm_add_vcpu(&s, 3);
			slot_vm_visit(&s, v, 0, 256, READ_FIRST);
			slot_vm_visit(&s, v, 256, 256, WRITE_FIRST);
			/* 1, 3 and 4 pages, then 8 each */
			EQUAL("resolver calls", s.source.total, 3 + (512 - 8) / 8);
			vcpu_detach(v);
			slot_vm_destroy(&s);
		}
	}
}

static const struct test_case cases[] = {
	{ "recognised", recognised, false },
	{ "false-friends", false_friends, false },
	{ "absent", absent, false },
	{ "named", named, false },
	{ "anon", on_thread_anon, true },
	{ "memfd", on_thread_memfd, true },
	{ "hugetlb", on_thread_hugetlb, true },
	{ "next-vm", next_vm, true },
	{ "access[memslot-flag]", access_told, false },
	{ "run-errno[memslot-flag]", run_errno, false },
	{ "prepared[memslot-flag]", prepared, false },
	{ "pre-fault[memslot-flag]", pre_fault, false },
};
TEST_MAIN(cases)
