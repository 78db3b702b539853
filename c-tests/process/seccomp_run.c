/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "seccomp_run.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

struct seccomp_run seccomp_run = { .backing = MEMFD };

static struct kvmfault_file_source *file_source;
static int snapshot, working_set, uffd;
static pthread_t completer;
static atomic_long pending = -1;
static atomic_bool over, retried;

/* Each way to answer: page n by n modulo 8. */
static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	long page = (fault->gpa - RAM_GPA) / PAGE;
	if (fault->origin == KVMFAULT_ORIGIN_VCPU || fault->origin == KVMFAULT_ORIGIN_HOST)
		switch (page % 8) {
		case 1:
			if (atomic_compare_exchange_strong(&pending, &(long){ -1 }, page))
				return KVMFAULT_PENDING;
			break;
		case 2:
			if (!atomic_exchange(&retried, true))
				return KVMFAULT_RETRY;
			break;
		case 3:
			return kvmfault_file_source_resolve(file_source, vm, fault);
		}
	int ret = source_install(&seccomp_run.source, vm, fault->gpa, fault->len);
	return ret < 0 && ret != -EEXIST ? ret : KVMFAULT_RESOLVED;
}

static void *complete(void *opaque)
{
	(void)opaque;
	while (!over) {
		long page = pending;
		if (page >= 0) {
			usleep(2000);
			OK(source_install(&seccomp_run.source, seccomp_run.machine.library, RAM_GPA + page * PAGE,
					  PAGE));
			pending = -1;
		}
		usleep(200);
	}
	return NULL;
}

static void load(struct vcpu *v, uint64_t page)
{
	struct step *step = seccomp_run.steps[v->number];
	struct step in = { READ64, RAM_GPA + page * PAGE, 0, 0 }, out = { WRITE64, RAM_GPA + page * PAGE + 8, 4711, 0 };
	/* Some pages are written to first. */
	step[page / 4 % 2] = in;
	step[!(page / 4 % 2)] = out;
	step[2] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, seccomp_run.steps_gpa[v->number]);
}

static _Thread_local struct vcpu *mine;

static void on_kick(int signal)
{
	(void)signal;
}

static void on_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	if (!mine || kvmfault_vcpu_on_sigbus(mine->handle, info->si_code, info->si_addr) != 1)
		_exit(99);
}

static void attach(struct vcpu *v)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	if (!seccomp_run.by_handler) {
		vcpu_attach(v);
		return;
	}
	options.fd = v->fd;
	options.run = v->run;
	options.sigbus = KVMFAULT_SIGBUS_BY_HANDLER;
	options.kick_signal = SIGUSR1;
	OK(kvmfault_vcpu_new(seccomp_run.machine.library, &options, &v->handle));
}

/* Visits pages at CPL 3 and at CPL 0, whose accesses KVM may emulate. */
static void *visit(struct vcpu *v)
{
	mine = v;
	attach(v);
	/* Each has pages that the other one hasn't touched. */
	for (uint64_t n = 0; n < PAGES / 2; n++) {
		uint64_t page = n ^ (v->number ? 64 : 0);
		load(v, page);
		EQUAL("stop", vcpu_run(v), 0);
		EQUAL("word", seccomp_run.steps[v->number][page / 4 % 2].value,
		      pattern_word(&seccomp_run.source.pattern, page, 0));
	}
	return NULL;
}

static void *visit_lost_page(struct vcpu *v)
{
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	int ret;
	mine = v;
	load(v, PAGES - 1);
	while ((ret = kvmfault_vcpu_run(v->handle)) == KVMFAULT_INTERRUPTED)
		;
	EQUAL("a lost page", ret, KVMFAULT_MEMORY_ERROR);
	OK(kvmfault_vcpu_memory_error(v->handle, &info));
	/* Before Linux 6.6, with userfaultfd, it comes to the thread as SIGSEGV otherwise. */
	OK(kvmfault_vcpu_kick(v->handle));
	EQUAL("after a kick", kvmfault_vcpu_run(v->handle), KVMFAULT_INTERRUPTED);
	vcpu_detach(v);
	return NULL;
}

void seccomp_run_prepare(void)
{
	machine_create(&seccomp_run.machine, 2 * PAGE);
	ram_create(&seccomp_run.ram, seccomp_run.backing, PAGES * PAGE);
	source_create(&seccomp_run.source, RAM_GPA, seccomp_run.ram.len, PATTERN);
	for (int n = 0; n < 2; n++) {
		seccomp_run.steps[n] = machine_share(&seccomp_run.machine, PAGE, &seccomp_run.steps_gpa[n]);
		machine_add_vcpu(&seccomp_run.machine, n ? 0 : 3);
	}
	snapshot = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	SYS(ftruncate(snapshot, PAGES * PAGE));
	for (uint64_t page = 3; page < PAGES; page += 8) {
		uint8_t bytes[PAGE];
		pattern_fill(&seccomp_run.source.pattern, page, bytes);
		EQUAL("pwrite", pwrite(snapshot, bytes, PAGE, page * PAGE), PAGE);
	}
	working_set = SYS(memfd_create("working set", MFD_CLOEXEC));
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
}

static struct kvmfault_file_range whole(void)
{
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	range.gpa = RAM_GPA;
	range.len = PAGES * PAGE;
	return range;
}

void seccomp_run_set_up(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_file_range range = whole();
	OK(kvmfault_file_source_new(snapshot, &range, 1, &file_source));
	/* Once with a userfaultfd that is given, then with one that the library opens. */
	if (uffd >= 0) {
		options.uffd = uffd;
		options.resolver = resolve;
		machine_attach(&seccomp_run.machine, NULL, &options);
		kvmfault_vm_free(seccomp_run.machine.library);
		options.uffd = -1;
	}
	options.resolver = resolve;
	machine_attach(&seccomp_run.machine, NULL, &options);
	machine_set_slot(&seccomp_run.machine, &seccomp_run.ram, RAM_SLOT, RAM_GPA);
}

void seccomp_run_guest(void)
{
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	struct kvmfault_fill *fill;

	CHECK(!pthread_create(&completer, NULL, complete, NULL), "pthread_create");
	OK(kvmfault_working_set_record(seccomp_run.machine.library, 1));
	for (int n = 0; n < 2; n++)
		vcpu_start(seccomp_run.machine.vcpu[n], visit, NULL);
	for (int n = 0; n < 2; n++)
		vcpu_join(seccomp_run.machine.vcpu[n]);
	/* The host touches absent pages. */
	for (uint64_t page = PAGES / 2; seccomp_run.backing == MEMFD && !seccomp_run.host_waits && page < PAGES / 2 + 4;
	     page++)
		EQUAL("the host reads", *(volatile uint64_t *)(seccomp_run.ram.hva + page * PAGE),
		      pattern_word(&seccomp_run.source.pattern, page, 0));
	OK(kvmfault_pages_zero(seccomp_run.machine.library, RAM_GPA + (PAGES - 2) * PAGE, PAGE));
	OK(kvmfault_pages_lost(seccomp_run.machine.library, RAM_GPA + (PAGES - 1) * PAGE, PAGE));
	for (int n = 0; n < 2; n++) {
		vcpu_start(seccomp_run.machine.vcpu[n], visit_lost_page, NULL);
		vcpu_join(seccomp_run.machine.vcpu[n]);
	}
	for (uint64_t page = PAGES - 3; page < PAGES; page++)
		OK(kvmfault_pages_discard(seccomp_run.machine.library, RAM_GPA + page * PAGE, PAGE));
	OK(kvmfault_memslot_set_fast_only(seccomp_run.machine.library, RAM_SLOT, 0));
	OK(kvmfault_memslot_set_fast_only(seccomp_run.machine.library, RAM_SLOT, 1));
	OK(kvmfault_pages_resolve(seccomp_run.machine.library, RAM_GPA + (PAGES - 8) * PAGE, 4 * PAGE));
	OK(kvmfault_working_set_save(seccomp_run.machine.library, working_set));
	options.working_set_fd = working_set;
	options.threads = 2;
	OK(kvmfault_fill_start(seccomp_run.machine.library, &options, &fill));
	OK(kvmfault_fill_wait(fill, 60000));
	kvmfault_fill_free(fill);
	OK(kvmfault_vm_stats(seccomp_run.machine.library, &stats));
	EQUAL("absent pages", kvmfault_pages_absent(seccomp_run.machine.library), 0);
	over = true;
	pthread_join(completer, NULL);
}

void seccomp_run_end(void)
{
	kvmfault_vm_free(seccomp_run.machine.library);
	seccomp_run.machine.library = NULL;
	kvmfault_file_source_free(file_source);
}

void seccomp_run_by_handler(void)
{
	struct sigaction kick = { .sa_handler = on_kick }, bus = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	seccomp_run.by_handler = true;
	SYS(sigaction(SIGUSR1, &kick, NULL));
	SYS(sigaction(SIGBUS, &bus, NULL));
}
