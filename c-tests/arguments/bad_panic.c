/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A bug in the library itself: with KVMFAULT_TEST_PANIC=function in the environment that function
 * panics. The program must survive and get -ENOTRECOVERABLE; the handle can only be freed.
 */
#define _GNU_SOURCE
#include "intact_vm.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static uint8_t bytes[PAGE];
static atomic_uint finalized;

static void finalizer(void *opaque)
{
	(void)opaque;
	finalized++;
}

static int zeros(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	int ret = kvmfault_pages_zero(vm, fault->gpa, fault->len);
	return ret ? ret : KVMFAULT_RESOLVED;
}

/*
 * The environment is read once: each function gets a process of its own, which has not called the
 * library before.
 */
static void in_child(const char *function, void (*body)(void))
{
	int status;
	fflush(stdout);
	pid_t child = fork();
	CHECK(child >= 0, "fork: %s", strerror(errno));
	if (child == 0) {
		setenv("KVMFAULT_TEST_PANIC", function, 1);
		body();
		_exit(0);
	}
	SYS(waitpid(child, &status, 0));
	CHECK(!WIFSIGNALED(status), "%s: the process died of signal %d", function, WTERMSIG(status));
	CHECK(WEXITSTATUS(status) != 77, "%s: skipped, see above", function);
	CHECK(WEXITSTATUS(status) == 0, "%s: see above", function);
}

static struct machine machine;

static void create(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	machine_create(&machine, PAGE);
	options.resolver = zeros;
	options.finalizer = finalizer;
	machine_attach(&machine, NULL, &options);
}

/* ---- functions of a VM ---- */

#define VM machine.library
static struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
static struct kvmfault_region region = KVMFAULT_REGION_INIT;
static struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
static struct kvmfault_vcpu_options vcpu_options = KVMFAULT_VCPU_OPTIONS_INIT;
static struct kvmfault_vcpu *new_vcpu;
static struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
static struct kvmfault_fill *fill;

/* clang-format off */
static long long vm_mechanism(void) { return kvmfault_vm_mechanism(VM); }
static long long vm_enable(void) { return kvmfault_vm_enable(VM, 0); }
static long long vm_check_guest(void) { return kvmfault_vm_check_guest(VM, -1); }
static long long vm_stats(void) { return kvmfault_vm_stats(VM, &stats); }
static long long memslot_set(void) { return kvmfault_memslot_set(VM, &slot); }
static long long memslot_prepare(void) { return kvmfault_memslot_prepare(VM, &slot, &region); }
static long long memslot_set_fast_only(void) { return kvmfault_memslot_set_fast_only(VM, 0, 1); }
static long long memslot_mechanism(void) { return kvmfault_memslot_mechanism(VM, 0); }
static long long pages_install(void) { return kvmfault_pages_install(VM, 0, bytes, PAGE); }
static long long pages_zero(void) { return kvmfault_pages_zero(VM, 0, PAGE); }
static long long pages_map(void) { return kvmfault_pages_map(VM, 0, PAGE); }
static long long pages_lost(void) { return kvmfault_pages_lost(VM, 0, PAGE); }
static long long pages_discard(void) { return kvmfault_pages_discard(VM, 0, PAGE); }
static long long pages_withdraw(void) { return kvmfault_pages_withdraw(VM, 0, PAGE); }
static long long pages_bitmap(void) { return kvmfault_pages_bitmap(VM, 0, PAGE, KVMFAULT_STATE_ABSENT, bytes, 8); }
static long long pages_give_back(void) { return kvmfault_pages_give_back(VM, 0, PAGE); }
static long long pages_resolve(void) { return kvmfault_pages_resolve(VM, 0, PAGE); }
static long long pages_arrived(void) { return kvmfault_pages_arrived(VM, bytes, PAGE); }
static long long pages_missing(void) { return kvmfault_pages_missing(VM, bytes, PAGE); }
static long long pages_state(void) { return kvmfault_pages_state(VM, 0); }
static long long pages_absent(void) { return kvmfault_pages_absent(VM); }
static long long fill_start(void) { return kvmfault_fill_start(VM, &fill_options, &fill); }
static long long working_set_record(void) { return kvmfault_working_set_record(VM, 0); }
static long long working_set_save(void) { return kvmfault_working_set_save(VM, -1); }
static long long vcpu_new(void) { return kvmfault_vcpu_new(VM, &vcpu_options, &new_vcpu); }
/* clang-format on */

struct function {
	const char *name;
	long long (*call)(void);
};
static const struct function of_a_vm[] = {
	{ "kvmfault_vm_mechanism", vm_mechanism },
	{ "kvmfault_vm_enable", vm_enable },
	{ "kvmfault_vm_check_guest", vm_check_guest },
	{ "kvmfault_vm_stats", vm_stats },
	{ "kvmfault_memslot_set", memslot_set },
	{ "kvmfault_memslot_prepare", memslot_prepare },
	{ "kvmfault_memslot_set_fast_only", memslot_set_fast_only },
	{ "kvmfault_memslot_mechanism", memslot_mechanism },
	{ "kvmfault_pages_install", pages_install },
	{ "kvmfault_pages_zero", pages_zero },
	{ "kvmfault_pages_map", pages_map },
	{ "kvmfault_pages_lost", pages_lost },
	{ "kvmfault_pages_discard", pages_discard },
	{ "kvmfault_pages_withdraw", pages_withdraw },
	{ "kvmfault_pages_bitmap", pages_bitmap },
	{ "kvmfault_pages_give_back", pages_give_back },
	{ "kvmfault_pages_resolve", pages_resolve },
	{ "kvmfault_pages_arrived", pages_arrived },
	{ "kvmfault_pages_missing", pages_missing },
	{ "kvmfault_pages_state", pages_state },
	{ "kvmfault_pages_absent", pages_absent },
	{ "kvmfault_fill_start", fill_start },
	{ "kvmfault_working_set_record", working_set_record },
	{ "kvmfault_working_set_save", working_set_save },
	/*
	 * kvmfault_vcpu_new clears its result before: that is an entry without a handle, and
	 * poisons nothing.
	 */
};
static const struct function *current;

static void wait_for_finalizer(void)
{
	for (double end = now() + 5; now() < end && !finalized;)
		usleep(1000);
	EQUAL("calls of the finalizer", finalized, 1);
}

static void vm_function(void)
{
	create();
	REFUSED(current->call(), ENOTRECOVERABLE, current->name);
	/* From now on all functions refuse the handle, and say why. */
	for (size_t i = 0; i < sizeof(of_a_vm) / sizeof(*of_a_vm); i++)
		REFUSED(of_a_vm[i].call(), ENOTRECOVERABLE, "panicked");
	EQUAL("calls of the finalizer", finalized, 0);
	kvmfault_vm_free(VM);
	wait_for_finalizer();
	REFUSED(kvmfault_vm_stats(VM, &stats), EBADF, "freed");

	/* Another VM is none the worse for it (as far as this function isn't needed). */
	finalized = 0;
	create();
	struct ram ram;
	ram_create(&ram, MEMFD, PAGE);
	slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	if (current->call != memslot_set && current->call != memslot_mechanism)
		OK(kvmfault_memslot_set(VM, &slot));
	kvmfault_vm_free(VM);
	wait_for_finalizer();
}

static void vm_functions(void)
{
	for (size_t i = 0; i < sizeof(of_a_vm) / sizeof(*of_a_vm); i++) {
		current = &of_a_vm[i];
		in_child(current->name, vm_function);
	}
}

/* ---- functions of a vCPU ---- */

static struct vcpu *vcpu;
static struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;

/* clang-format off */
static long long run(void) { return kvmfault_vcpu_run(vcpu->handle); }
static long long handle_exit(void) { return kvmfault_vcpu_handle_exit(vcpu->handle, 0); }
static long long resume(void) { return kvmfault_vcpu_resume(vcpu->handle); }
static long long resolve_range(void) { return kvmfault_vcpu_resolve(vcpu->handle, RAM_GPA, 1); }
static long long memory_error(void) { return kvmfault_vcpu_memory_error(vcpu->handle, &info); }
static long long vcpu_stats(void) { return kvmfault_vcpu_stats(vcpu->handle, &stats); }
/* clang-format on */

static const struct function of_a_vcpu[] = {
	{ "kvmfault_vcpu_run", run },
	{ "kvmfault_vcpu_handle_exit", handle_exit },
	{ "kvmfault_vcpu_resume", resume },
	{ "kvmfault_vcpu_resolve", resolve_range },
	{ "kvmfault_vcpu_memory_error", memory_error },
	{ "kvmfault_vcpu_stats", vcpu_stats },
};

static void vcpu_function(void)
{
	sigset_t before, after;
	create();
	vcpu = machine_add_vcpu(&machine, 3);
	pthread_sigmask(SIG_SETMASK, NULL, &before);
	vcpu_attach(vcpu);
	REFUSED(current->call(), ENOTRECOVERABLE, current->name);
	for (size_t i = 0; i < sizeof(of_a_vcpu) / sizeof(*of_a_vcpu); i++)
		REFUSED(of_a_vcpu[i].call(), ENOTRECOVERABLE, "panicked");
	/* Signal handlers may still call these. */
	OK(kvmfault_vcpu_kick(vcpu->handle));
	OK(kvmfault_vcpu_on_sigbus(vcpu->handle, BUS_ADRERR, NULL));
	/* The VM isn't concerned. */
	OK(kvmfault_vm_stats(VM, &stats));

	kvmfault_vcpu_free(vcpu->handle);
	pthread_sigmask(SIG_SETMASK, NULL, &after);
	CHECK(sigismember(&before, SIGBUS) == sigismember(&after, SIGBUS), "SIGBUS is still blocked");
	vcpu_attach(vcpu);
	kvmfault_vcpu_free(vcpu->handle);
	kvmfault_vm_free(VM);
	wait_for_finalizer();
}

static void vcpu_functions(void)
{
	for (size_t i = 0; i < sizeof(of_a_vcpu) / sizeof(*of_a_vcpu); i++) {
		current = &of_a_vcpu[i];
		in_child(current->name, vcpu_function);
	}
}

/* ---- functions without a handle ---- */

static void new_vm(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	machine_create(&machine, PAGE);
	options.kvm_fd = machine.kvm;
	options.vm_fd = machine.vm;
	options.resolver = zeros;
	options.finalizer = finalizer;
	for (int i = 0; i < 3; i++) {
		struct kvmfault_vm *vm = NULL;
		REFUSED(kvmfault_vm_new(&options, &vm), ENOTRECOVERABLE, "kvmfault_vm_new");
		CHECK(!vm, "a handle");
	}
	EQUAL("calls of the finalizer", finalized, 0);
	/* Nothing that others use was harmed. */
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	OK(kvmfault_probe(-1, &probe));
}

static void new_vcpu_handle(void)
{
	create();
	vcpu = machine_add_vcpu(&machine, 3);
	vcpu_options.fd = vcpu->fd;
	REFUSED(vcpu_new(), ENOTRECOVERABLE, "kvmfault_vcpu_new");
	CHECK(!new_vcpu, "a handle");
	kvmfault_vm_free(VM);
	wait_for_finalizer();
}

static void probe(void)
{
	struct kvmfault_probe p = KVMFAULT_PROBE_INIT;
	REFUSED(kvmfault_probe(-1, &p), ENOTRECOVERABLE, "kvmfault_probe");
	CHECK(kvmfault_explain(-1, NULL, 0) > 0, "explain: %s", kvmfault_last_error());
}

static void explain(void)
{
	struct kvmfault_probe p = KVMFAULT_PROBE_INIT;
	REFUSED(kvmfault_explain(-1, NULL, 0), ENOTRECOVERABLE, "kvmfault_explain");
	OK(kvmfault_probe(-1, &p));
}

static void new_source(void)
{
	struct kvmfault_file_source *source = NULL;
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	int fd = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	SYS(ftruncate(fd, PAGE));
	range.len = PAGE;
	REFUSED(kvmfault_file_source_new(fd, &range, 1, &source), ENOTRECOVERABLE, "kvmfault_file_source_new");
	CHECK(!source, "a handle");
}

static void functions_without_a_handle(void)
{
	in_child("kvmfault_vm_new", new_vm);
	in_child("kvmfault_vcpu_new", new_vcpu_handle);
	in_child("kvmfault_probe", probe);
	in_child("kvmfault_explain", explain);
	in_child("kvmfault_file_source_new", new_source);
}

/* ---- freeing has no result; the process goes on ---- */

static void free_vm(void)
{
	create();
	kvmfault_vm_free(VM);
	CHECK(strstr(kvmfault_last_error(), "kvmfault_vm_free"), "the message is: %s", kvmfault_last_error());
}

static void free_vcpu(void)
{
	create();
	vcpu = machine_add_vcpu(&machine, 3);
	vcpu_attach(vcpu);
	kvmfault_vcpu_free(vcpu->handle);
	CHECK(strstr(kvmfault_last_error(), "kvmfault_vcpu_free"), "the message is: %s", kvmfault_last_error());
}

static void freeing(void)
{
	in_child("kvmfault_vm_free", free_vm);
	in_child("kvmfault_vcpu_free", free_vcpu);
}

/* ---- in the middle of a fault ---- */

/*
 * A function that the resolver calls on the vCPU's thread panics: the run ends with the error, the
 * page is absent again.
 */
static void in_the_resolver(void)
{
	struct ram ram;
	uint64_t gpa;
	create();
	ram_create(&ram, MEMFD, 16 * PAGE);
	machine_set_slot(&machine, &ram, RAM_SLOT, RAM_GPA);
	vcpu = machine_add_vcpu(&machine, 3);
	struct step *script = machine_share(&machine, PAGE, &gpa);
	script[0] = (struct step){ .operation = READ64, .address = RAM_GPA };
	script[1] = (struct step){ .operation = STOP };
	vcpu_load_script(vcpu, gpa);
	vcpu_attach(vcpu);
	if (kvmfault_memslot_mechanism(VM, RAM_SLOT) == KVMFAULT_MECHANISM_USERFAULTFD)
		skip("a vCPU that waits in userfaultfd waits until the page comes");
	REFUSED(kvmfault_vcpu_run(vcpu->handle), ENOTRECOVERABLE, "resolver");
	REFUSED(kvmfault_pages_state(VM, RAM_GPA), ENOTRECOVERABLE, "panicked");
	/* And again: an error each time, and no hang. */
	REFUSED(kvmfault_vcpu_run(vcpu->handle), ENOTRECOVERABLE, "resolver");
	kvmfault_vcpu_free(vcpu->handle);
	kvmfault_vm_free(VM);
	wait_for_finalizer();
}

static void during_a_fault(void)
{
	int status;
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		setenv("KVMFAULT_TEST_PANIC", "kvmfault_pages_zero", 1);
		in_the_resolver();
		_exit(0);
	}
	SYS(waitpid(child, &status, 0));
	if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
		_exit(77); /* the reason is on stdout */
	CHECK(status == 0, "status %#x, see above", status);
}

static const struct test_case cases[] = {
	{ "vm-functions", vm_functions, false },
	{ "vcpu-functions", vcpu_functions, false },
	{ "functions-without-a-handle", functions_without_a_handle, false },
	{ "freeing", freeing, false },
	{ "during-a-fault", during_a_fault, false },
};
TEST_MAIN(cases)
