/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Handles in a forked child: refused there, freed there without effect on the parent; and a VM of
 * the child's own.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <dirent.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/* What children and parent share. */
static struct shared {
	char complaint[512];
	atomic_int finalized;
} * shared;

static struct kvmfault_file_source *source;
static struct kvmfault_fill *fill;
static atomic_bool let_go;
static atomic_long held = -1; /* the page that the fill's resolver call is held at */

/* ---- children ---- */

static void complain(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
static void complain(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(shared->complaint, sizeof(shared->complaint), format, arguments);
	va_end(arguments);
	_exit(1);
}
#define CHILD_EQUAL(what, got, expected)                                                                     \
	do {                                                                                                 \
		long long got_ = (long long)(got), expected_ = (long long)(expected);                        \
		if (got_ != expected_)                                                                       \
			complain("%s: is %lld, not %lld: %s", what, got_, expected_, kvmfault_last_error()); \
	} while (0)

/*
 * Runs in a forked child, which ends by _exit(0) if it returns. It must return soon: a lock that
 * was held at the fork must not block it forever.
 */
static void in_child(void (*body)(void))
{
	int status;
	fflush(NULL);
	pid_t child = SYS(fork());
	if (child == 0) {
		alarm(60);
		body();
		_exit(0);
	}
	SYS(waitpid(child, &status, 0));
	CHECK(!WIFSIGNALED(status), "a child was ended by signal %d", WTERMSIG(status));
	CHECK(status == 0, "in a child: %s", shared->complaint);
}

/* ---- the parent ---- */

/* A fill is held in its first call, so that there is one. */
static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	if (fault->origin == KVMFAULT_ORIGIN_FILL) {
		held = resolver_vm_page_of(fault);
		while (!let_go)
			usleep(1000);
	}
	int ret = source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
	return ret < 0 && ret != -EEXIST ? ret : KVMFAULT_RESOLVED;
}

static void finalizer(void *opaque)
{
	(void)opaque;
	shared->finalized++;
}

/*
 * Half of the guest's memory is there, one page is held by a fill, and there is a handle of each
 * type.
 */
static void set_up(enum backing backing)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	let_go = false;
	held = -1;
	shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(shared != MAP_FAILED, "mmap: %s", strerror(errno));
	options.resolver = resolve;
	options.finalizer = finalizer;
	resolver_vm_set_up_with(&options, backing, 1, 3);
	vcpu_attach(resolver_vm.m.vcpu[0]);
	for (int page = 0; page < RESOLVER_VM_PAGES / 2; page++)
		resolver_vm_read(resolver_vm.m.vcpu[0], page);
	fill_options.batch = 1;
	fill_options.flags = KVMFAULT_FILL_KEEP_ARMED;
	OK(kvmfault_fill_start(resolver_vm.m.library, &fill_options, &fill));
	UNTIL(held >= 0);
	int file = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	SYS(ftruncate(file, resolver_vm.ram.len));
	range.gpa = RAM_GPA;
	range.len = resolver_vm.ram.len;
	OK(kvmfault_file_source_new(file, &range, 1, &source));
	close(file);
}

/*
 * What was there is there, and the rest comes, for the guest and the host; then all handles end as
 * always.
 */
static void go_on_and_tear_down(void)
{
	struct vcpu *v = resolver_vm.m.vcpu[0];
	uint64_t calls = machine_stats(&resolver_vm.m).resolver_calls;
	EQUAL("immediate_exit", v->run->immediate_exit, 0);
	EQUAL("kicks", machine_stats(&resolver_vm.m).kicks, 0);
	EQUAL("finalizers that ran in children", shared->finalized, 0);
	for (int page = 0; page < RESOLVER_VM_PAGES; page++)
		if (page != held)
			resolver_vm_read(v, page);
	CHECK(machine_stats(&resolver_vm.m).resolver_calls > calls, "pages came without a resolver call");
	let_go = true;
	OK(kvmfault_fill_wait(fill, 60000));
	resolver_vm_read(v, held);
	pattern_check(&resolver_vm.source.pattern, resolver_vm.ram.hva, 0, RESOLVER_VM_PAGES);
	/* A discarded page is trapped as before. */
	OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA, PAGE));
	resolver_vm_read(v, 0);
	kvmfault_fill_free(fill);
	kvmfault_file_source_free(source);
	vcpu_detach(v);
	resolver_vm_tear_down();
	UNTIL(shared->finalized == 1);
	munmap(shared, PAGE);
}

/* ---- each call ---- */

static void call_each(void)
{
	static uint8_t bytes[PAGE];
	struct kvmfault_vm *vm = resolver_vm.m.library, *no_vm;
	struct vcpu *v = resolver_vm.m.vcpu[0];
	struct kvmfault_vcpu *vcpu = v->handle, *no_vcpu;
	struct kvmfault_fill *no_fill;
	struct kvmfault_memslot slot = slot_on(&resolver_vm.ram, RAM_SLOT, RAM_GPA), gone = KVMFAULT_MEMSLOT_INIT;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	struct kvmfault_vcpu_options vcpu_options = KVMFAULT_VCPU_OPTIONS_INIT;
	struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill_progress progress = KVMFAULT_FILL_PROGRESS_INIT;
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	uint64_t absent = RAM_GPA + (RESOLVER_VM_PAGES - 1) * PAGE;
	struct kvmfault_fault fault = {
		.size = sizeof(fault), .gpa = absent, .len = PAGE, .window_gpa = absent, .window_len = PAGE
	};

	(void)no_vm;
	gone.slot = RAM_SLOT;
	vcpu_options.fd = v->fd;
	vcpu_options.run = v->run;
#define REFUSED_HERE(call) CHILD_EQUAL(#call, call, -ECHILD)
	REFUSED_HERE(kvmfault_vm_mechanism(vm));
	CHECK(strstr(kvmfault_last_error(), "vm: ") && strstr(kvmfault_last_error(), "parent"), "%s",
	      kvmfault_last_error());
	REFUSED_HERE(kvmfault_vm_close(vm, 0));
	REFUSED_HERE(kvmfault_vm_check_guest(vm, v->fd));
	REFUSED_HERE(kvmfault_vm_enable(vm, 0));
	REFUSED_HERE(kvmfault_vm_stats(vm, &stats));
	REFUSED_HERE(kvmfault_memslot_set(vm, &slot));
	REFUSED_HERE(kvmfault_memslot_set(vm, &gone));
	REFUSED_HERE(kvmfault_memslot_prepare(vm, &gone, &region));
	REFUSED_HERE(kvmfault_memslot_set_fast_only(vm, RAM_SLOT, 0));
	REFUSED_HERE(kvmfault_memslot_mechanism(vm, RAM_SLOT));
	REFUSED_HERE(kvmfault_pages_install(vm, absent, bytes, PAGE));
	REFUSED_HERE(kvmfault_pages_zero(vm, absent, PAGE));
	REFUSED_HERE(kvmfault_pages_map(vm, absent, PAGE));
	REFUSED_HERE(kvmfault_pages_arrived(vm, resolver_vm.ram.hva, PAGE));
	REFUSED_HERE(kvmfault_pages_missing(vm, resolver_vm.ram.hva, PAGE));
	REFUSED_HERE(kvmfault_pages_lost(vm, absent, PAGE));
	REFUSED_HERE(kvmfault_pages_discard(vm, RAM_GPA, PAGE));
	REFUSED_HERE(kvmfault_pages_give_back(vm, RAM_GPA, PAGE));
	REFUSED_HERE(kvmfault_pages_resolve(vm, absent, PAGE));
	REFUSED_HERE(kvmfault_pages_state(vm, absent));
	REFUSED_HERE(kvmfault_pages_withdraw(vm, RAM_GPA, resolver_vm.ram.len));
	REFUSED_HERE(kvmfault_pages_bitmap(vm, RAM_GPA, resolver_vm.ram.len, 1, bytes, sizeof(bytes)));
	REFUSED_HERE(kvmfault_pages_absent(vm));
	REFUSED_HERE(kvmfault_vcpu_new(vm, &vcpu_options, &no_vcpu));
	REFUSED_HERE(kvmfault_vcpu_run(vcpu));
	REFUSED_HERE(kvmfault_vcpu_handle_exit(vcpu, -EINTR));
	REFUSED_HERE(kvmfault_vcpu_resume(vcpu));
	REFUSED_HERE(kvmfault_vcpu_on_sigbus(vcpu, BUS_MCEERR_AR, resolver_vm.ram.hva));
	REFUSED_HERE(kvmfault_vcpu_kick(vcpu));
	REFUSED_HERE(kvmfault_vcpu_resolve(vcpu, absent, PAGE));
	REFUSED_HERE(kvmfault_vcpu_memory_error(vcpu, &info));
	REFUSED_HERE(kvmfault_vcpu_stats(vcpu, &stats));
	REFUSED_HERE(kvmfault_file_source_resolve(source, vm, &fault));
	REFUSED_HERE(kvmfault_fill_start(vm, &fill_options, &no_fill));
	REFUSED_HERE(kvmfault_fill_wait(fill, 0));
	REFUSED_HERE(kvmfault_fill_wait_working_set(fill, 0));
	REFUSED_HERE(kvmfault_fill_status(fill, &progress));
	REFUSED_HERE(kvmfault_fill_stop(fill));
	REFUSED_HERE(kvmfault_fill_pause(fill));
	REFUSED_HERE(kvmfault_fill_resume(fill));
	REFUSED_HERE(kvmfault_working_set_record(vm, 1));
	REFUSED_HERE(kvmfault_working_set_save(vm, 1));
#undef REFUSED_HERE
	CHILD_EQUAL("kvmfault_vm_address", kvmfault_vm_address(vm, resolver_vm.ram.hva), 0);
	CHILD_EQUAL("an argument that is wrong anyway", kvmfault_vcpu_kick(NULL), -EINVAL);
}

static void call_each_in_grandchild(void)
{
	in_child(call_each);
}

static void calls(void)
{
	set_up(MEMFD);
	in_child(call_each);
	in_child(call_each_in_grandchild);
	go_on_and_tear_down();
}

/* ---- freeing ---- */

static unsigned open_anonymous_inodes(void)
{
	char path[300], target[64] = "";
	unsigned count = 0;
	DIR *dir = opendir("/proc/self/fd");
	for (struct dirent *entry; dir && (entry = readdir(dir));) {
		snprintf(path, sizeof(path), "/proc/self/fd/%s", entry->d_name);
		memset(target, 0, sizeof(target));
		if (readlink(path, target, sizeof(target) - 1) > 0)
			count += !strncmp(target, "anon_inode:", 11);
	}
	if (dir)
		closedir(dir);
	return count;
}

static void free_all(void)
{
	kvmfault_fill_free(fill);
	kvmfault_vcpu_free(resolver_vm.m.vcpu[0]->handle);
	kvmfault_vm_free(resolver_vm.m.library);
	kvmfault_file_source_free(source);
}

/* The child's copies are closed, but for those that the VMM has itself. */
static void free_here(void)
{
	unsigned before = open_anonymous_inodes();
	free_all();
	unsigned after = open_anonymous_inodes();
	CHILD_EQUAL("descriptors closed (VM, vCPU, userfaultfd, eventfd)", before - after, before ? 4 : 0);
	CHILD_EQUAL("after freeing", kvmfault_pages_absent(resolver_vm.m.library), -EBADF);
	CHILD_EQUAL("after freeing", kvmfault_vcpu_kick(resolver_vm.m.vcpu[0]->handle), -EBADF);
	free_all();
}

/* As a helper whose exec fails: the VMM's exit handlers and destructors run. */
static void exit_here(void)
{
	atexit(free_all);
	exit(0);
}

static void free_in_grandchild(void)
{
	in_child(free_here);
}

/* The numbers are the child's own by now. */
static void close_then_free(void)
{
	long last = sysconf(_SC_OPEN_MAX);
	for (int fd = 3; fd < last && fd < 4096; fd++)
		close(fd);
	for (int fd = 3; fd < 200; fd++)
		CHILD_EQUAL("dup2", dup2(0, fd), fd);
	free_all();
	for (int fd = 3; fd < 200; fd++)
		CHILD_EQUAL("a descriptor of the child's own", lseek(fd, 0, SEEK_CUR) == -1 && errno == EBADF, 0);
}

static void frees(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		set_up(backing);
		in_child(free_here);
		in_child(exit_here);
		in_child(free_in_grandchild);
		in_child(close_then_free);
		go_on_and_tear_down();
	}
}

/* ---- a VM of the child's own ---- */

static struct resolver_vm own;

static void use_own(void)
{
	struct vcpu *v;
	struct step *steps;
	uint64_t gpa;
	ram_create(&own.ram, MEMFD, RESOLVER_VM_PAGES * PAGE);
	machine_create(&own.m, PAGE);
	source_create(&own.source, RAM_GPA, own.ram.len, PATTERN);
	machine_attach(&own.m, &own.source, NULL);
	machine_set_slot(&own.m, &own.ram, RAM_SLOT, RAM_GPA);
	v = machine_add_vcpu(&own.m, 3);
	vcpu_attach(v);
	steps = machine_share(&own.m, PAGE, &gpa);
	for (int page = 0; page < RESOLVER_VM_PAGES / 2; page++) {
		steps[0] = (struct step){ READ64, RAM_GPA + page * PAGE, 0, 0 };
		steps[1] = (struct step){ STOP, 0, 0, 0 };
		vcpu_load_script(v, gpa);
		CHILD_EQUAL("stop", vcpu_run(v), 0);
		CHILD_EQUAL("word", steps[0].value, pattern_word(&own.source.pattern, page, 0));
	}
	pattern_check(&own.source.pattern, own.ram.hva, 0, RESOLVER_VM_PAGES);
}

static void refuse_both(void)
{
	CHILD_EQUAL("the grandparent's", kvmfault_pages_absent(resolver_vm.m.library), -ECHILD);
	CHILD_EQUAL("the parent's", kvmfault_pages_absent(own.m.library), -ECHILD);
	kvmfault_vm_free(own.m.library);
	free_all();
}

static void have_own(void)
{
	use_own();
	CHILD_EQUAL("the parent's", kvmfault_pages_absent(resolver_vm.m.library), -ECHILD);
	OK(kvmfault_pages_discard(own.m.library, RAM_GPA, PAGE));
	in_child(refuse_both);
	free_all();
	CHILD_EQUAL("absent", kvmfault_pages_absent(own.m.library), 1);
	pattern_check(&own.source.pattern, own.ram.hva, 0, RESOLVER_VM_PAGES);
	vcpu_detach(own.m.vcpu[0]);
	machine_destroy(&own.m);
}

static void own_vm(void)
{
	set_up(MEMFD);
	in_child(have_own);
	in_child(have_own);
	go_on_and_tear_down();
}

/* ---- other threads ---- */

static atomic_bool enough;

/*
 * Makes handles and frees them, again and again: the locks that the library takes for that are held
 * much of the time.
 */
static void *visit(void *opaque)
{
	(void)opaque;
	kvmfault_pages_resolve(resolver_vm.m.library, RAM_GPA + (RESOLVER_VM_PAGES - 1) * PAGE, PAGE);
	return NULL;
}

static void *bustle(void *opaque)
{
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	struct kvmfault_file_source *mine;
	int file = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	SYS(ftruncate(file, PAGE));
	range.len = PAGE;
	while (!enough) {
		pthread_t thread;
		if (opaque) {
			OK(kvmfault_file_source_new(file, &range, 1, &mine));
			kvmfault_file_source_free(mine);
		} else if (!pthread_create(&thread, NULL, visit, NULL)) {
			OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA + (RESOLVER_VM_PAGES - 1) * PAGE,
						  PAGE));
			pthread_join(thread, NULL);
		}
	}
	close(file);
	return NULL;
}

static void make_and_free(void)
{
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	struct kvmfault_file_source *mine;
	int file = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	SYS(ftruncate(file, PAGE));
	range.len = PAGE;
	free_all();
	CHILD_EQUAL("a source of the child's own", kvmfault_file_source_new(file, &range, 1, &mine), 0);
	kvmfault_file_source_free(mine);
	exit(0);
}

static void busy(void)
{
	pthread_t threads[4];
	set_up(MEMFD);
	for (uintptr_t n = 0; n < 4; n++)
		CHECK(!pthread_create(&threads[n], NULL, bustle, (void *)(n % 2)), "pthread_create");
	for (unsigned long n = SCALED(100, 10); n; n--)
		in_child(make_and_free);
	enough = true;
	for (int n = 0; n < 4; n++)
		pthread_join(threads[n], NULL);
	go_on_and_tear_down();
}

static const struct test_case cases[] = {
	{ "calls", calls, true },
	{ "frees", frees, true },
	{ "own_vm", own_vm, true },
	{ "busy", busy, true },
};
TEST_MAIN(cases)
