/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The system calls of docs/seccomp.md: a guest's memory is restored lazily under a filter that is made from the list, in each phase of it; and all that
 * the list has is really called.
 */
#define _GNU_SOURCE
#include "machine.h"
#include "seccomp_calls.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- the list ---- */

/* When a call is made. */
enum { SET_UP = 1, RUNNING = 2, ENDING = 4 };
/* Which of them may be missing in a run: the C library, the kernel, the options or luck decide. */
enum { ALWAYS, SOMETIMES };

static const struct call {
	const char *name;
	int number, when, certain;
} calls[] = {
#define CALL(name, when, certain) { #name, SYS_##name, when, certain },
	SECCOMP_CALLS(CALL)
#undef CALL
};
enum { CALLS = sizeof(calls) / sizeof(*calls), NUMBERS = 600 };

/* What only the tests call, beside the guest's run. */
static const int harness_calls[] = { SYS_write, SYS_exit_group };
enum { HARNESS_CALLS = sizeof(harness_calls) / sizeof(*harness_calls) };

static bool is_listed(int number, int when)
{
	for (int n = 0; n < HARNESS_CALLS; n++)
		if (harness_calls[n] == number)
			return true;
	for (int n = 0; n < CALLS; n++)
		if (calls[n].number == number && calls[n].when & when)
			return true;
	return false;
}

/* ---- filters ---- */

static void filter_all(struct sock_filter *filter, unsigned short length, unsigned flags, int *listener)
{
	struct sock_fprog program = { length, filter };
	SYS(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	long ret = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
	if (ret < 0 && (errno == EINVAL || errno == ENOSYS))
		skip("seccomp with flags %#x: %s", flags, strerror(errno));
	SYS(ret);
	if (listener)
		*listener = (int)ret;
}

/* All but the listed ones end the process. For the calling thread, and those that it starts. */
static void allow_listed(int when)
{
	static struct sock_filter filter[4 + 2 * (CALLS + HARNESS_CALLS)];
	unsigned short n = 0;
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
	for (int number = 0; number < NUMBERS; number++)
		if (is_listed(number, when)) {
			filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1);
			filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
		}
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	filter_all(filter, n, 0, NULL);
}

/* ---- noting what is called ---- */

static atomic_int phase;
static atomic_uchar seen[NUMBERS]; /* in which phases */
static int listener = -1;

/* Lets each call go on, and notes it. This thread came before the filter. */
static void *watch(void *opaque)
{
	(void)opaque;
	struct seccomp_notif request;
	for (;;) {
		memset(&request, 0, sizeof(request));
		if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &request)) {
			if (errno == EINTR || errno == ENOENT)
				continue;
			return NULL;
		}
		if (request.data.nr >= 0 && request.data.nr < NUMBERS)
			seen[request.data.nr] |= phase;
		struct seccomp_notif_resp response = { .id = request.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };
		ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response); /* the thread may have been killed, or have got a signal */
	}
}

static void *wait_then_watch(void *opaque)
{
	while (listener < 0)
		usleep(1000);
	return watch(opaque);
}

static void note_all(void)
{
	static struct sock_filter filter[] = { BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF) };
	/* The one call that this thread must make before the other one has the listener: what is written for the compiler is no call. */
	pthread_t thread;
	int made;
	CHECK(!pthread_create(&thread, NULL, wait_then_watch, NULL), "pthread_create");
	pthread_detach(thread);
	filter_all(filter, 1, SECCOMP_FILTER_FLAG_NEW_LISTENER, &made);
	listener = made;
}

/* ---- the run ---- */

enum { PAGES = 256, LAST = 1000 };
static struct machine machine;
static enum backing backing = MEMFD;
static struct ram ram;
static struct source source;
static struct kvmfault_file_source *file_source;
static struct step *steps[2];
static uint64_t steps_gpa[2];
static int snapshot, working_set, uffd;
static pthread_t completer;
static atomic_long pending = -1;
static atomic_bool over, retried;
static bool host_waits; /* no thread of the host is served */

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
	int ret = source_install(&source, vm, fault->gpa, fault->len);
	return ret < 0 && ret != -EEXIST ? ret : KVMFAULT_RESOLVED;
}

static void *complete(void *opaque)
{
	(void)opaque;
	while (!over) {
		long page = pending;
		if (page >= 0) {
			usleep(2000);
			OK(source_install(&source, machine.library, RAM_GPA + page * PAGE, PAGE));
			pending = -1;
		}
		usleep(200);
	}
	return NULL;
}

static void load(struct vcpu *v, uint64_t page)
{
	struct step *step = steps[v->number];
	struct step in = { READ64, RAM_GPA + page * PAGE, 0, 0 }, out = { WRITE64, RAM_GPA + page * PAGE + 8, 4711, 0 };
	/* Some pages are written to first. */
	step[page / 4 % 2] = in;
	step[!(page / 4 % 2)] = out;
	step[2] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, steps_gpa[v->number]);
}

static bool by_handler;
static __thread struct vcpu *mine;

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
	if (!by_handler) {
		vcpu_attach(v);
		return;
	}
	options.fd = v->fd;
	options.run = v->run;
	options.sigbus = KVMFAULT_SIGBUS_BY_HANDLER;
	options.kick_signal = SIGUSR1;
	OK(kvmfault_vcpu_new(machine.library, &options, &v->handle));
}

/* The same at CPL 3 and at CPL 0, of which KVM may emulate the accesses. */
static void *visit(struct vcpu *v)
{
	mine = v;
	attach(v);
	/* Each has pages that the other one hasn't touched. */
	for (uint64_t n = 0; n < PAGES / 2; n++) {
		uint64_t page = n ^ (v->number ? 64 : 0);
		load(v, page);
		EQUAL("stop", vcpu_run(v), 0);
		EQUAL("word", steps[v->number][page / 4 % 2].value, pattern_word(&source.pattern, page, 0));
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

static void prepare(void)
{
	machine_create(&machine, 2 * PAGE);
	ram_create(&ram, backing, PAGES * PAGE);
	source_create(&source, RAM_GPA, ram.len, PATTERN);
	for (int n = 0; n < 2; n++) {
		steps[n] = machine_share(&machine, PAGE, &steps_gpa[n]);
		machine_add_vcpu(&machine, n ? 0 : 3);
	}
	snapshot = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	SYS(ftruncate(snapshot, PAGES * PAGE));
	for (uint64_t page = 3; page < PAGES; page += 8) {
		uint8_t bytes[PAGE];
		pattern_fill(&source.pattern, page, bytes);
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

static void set_up(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_file_range range = whole();
	OK(kvmfault_file_source_new(snapshot, &range, 1, &file_source));
	/* Once with a userfaultfd that is given, then with one that the library opens. */
	if (uffd >= 0) {
		options.uffd = uffd;
		options.resolver = resolve;
		machine_attach(&machine, NULL, &options);
		kvmfault_vm_free(machine.library);
		options.uffd = -1;
	}
	options.resolver = resolve;
	machine_attach(&machine, NULL, &options);
	machine_set_slot(&machine, &ram, RAM_SLOT, RAM_GPA);
}

static void run(void)
{
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	struct kvmfault_fill *fill;

	CHECK(!pthread_create(&completer, NULL, complete, NULL), "pthread_create");
	OK(kvmfault_working_set_record(machine.library, 1));
	for (int n = 0; n < 2; n++)
		vcpu_start(machine.vcpu[n], visit, NULL);
	for (int n = 0; n < 2; n++)
		vcpu_join(machine.vcpu[n]);
	/* The host touches absent pages. */
	for (uint64_t page = PAGES / 2; backing == MEMFD && !host_waits && page < PAGES / 2 + 4; page++)
		EQUAL("the host reads", *(volatile uint64_t *)(ram.hva + page * PAGE), pattern_word(&source.pattern, page, 0));
	OK(kvmfault_pages_zero(machine.library, RAM_GPA + (PAGES - 2) * PAGE, PAGE));
	OK(kvmfault_pages_lost(machine.library, RAM_GPA + (PAGES - 1) * PAGE, PAGE));
	for (int n = 0; n < 2; n++) {
		vcpu_start(machine.vcpu[n], visit_lost_page, NULL);
		vcpu_join(machine.vcpu[n]);
	}
	for (uint64_t page = PAGES - 3; page < PAGES; page++)
		OK(kvmfault_pages_discard(machine.library, RAM_GPA + page * PAGE, PAGE));
	OK(kvmfault_memslot_set_fast_only(machine.library, RAM_SLOT, 0));
	OK(kvmfault_memslot_set_fast_only(machine.library, RAM_SLOT, 1));
	OK(kvmfault_pages_resolve(machine.library, RAM_GPA + (PAGES - 8) * PAGE, 4 * PAGE));
	OK(kvmfault_working_set_save(machine.library, working_set));
	options.working_set_fd = working_set;
	options.threads = 2;
	OK(kvmfault_fill_start(machine.library, &options, &fill));
	OK(kvmfault_fill_wait(fill, 60000));
	kvmfault_fill_free(fill);
	OK(kvmfault_vm_stats(machine.library, &stats));
	EQUAL("absent pages", kvmfault_pages_absent(machine.library), 0);
	over = true;
	pthread_join(completer, NULL);
}

static void end(void)
{
	kvmfault_vm_free(machine.library);
	machine.library = NULL;
	kvmfault_file_source_free(file_source);
}

/* ---- cases ---- */

/* The same list for all of it; then one for each phase, as a VMM has that narrows its filter. */
static void enforced(void)
{
	prepare();
	allow_listed(SET_UP | RUNNING | ENDING);
	set_up();
	run();
	end();
}

static void narrowed(void)
{
	prepare();
	set_up();
	allow_listed(RUNNING | ENDING);
	run();
	end();
}

static void enforced_anon(void)
{
	backing = ANON;
	enforced();
}

/* ---- one call that is refused ---- */

static void refuse(int number)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	filter_all(filter, 4, SECCOMP_FILTER_FLAG_TSYNC, NULL);
}

/* What became of a run without a call: 0, or what is on the way out in `text`. */
static int run_without(const struct call *call, int when, char *text, size_t size)
{
	int output[2], status;
	size_t length = 0;
	SYS(pipe(output));
	fflush(NULL);
	pid_t child = SYS(fork());
	if (!child) {
		dup2(output[1], 1);
		alarm(60);
		prepare();
		if (when == SET_UP)
			refuse(call->number);
		set_up();
		host_waits = when == RUNNING && call->number == SYS_read;
		if (when == RUNNING)
			refuse(call->number);
		run();
		end();
		_exit(0);
	}
	close(output[1]);
	for (ssize_t n; length < size - 1 && (n = read(output[0], text + length, size - 1 - length)) > 0;)
		length += n;
	text[length] = 0;
	close(output[0]);
	SYS(waitpid(child, &status, 0));
	return status;
}

/*
 * Calls of which a refusal (EPERM) either doesn't matter or comes as an error that names it, from the time on when the filter is there. Not here: what the
 * C library needs to have threads (futex, rseq, mmap, mprotect, clone3, exit).
 */
static const struct {
	const char *name, *words; /* in the error; NULL: as it is named */
	int when;
} refusals[] = {
	{ "ioctl", NULL, SET_UP | RUNNING },
	{ "read", NULL, SET_UP | RUNNING },
	{ "poll", NULL, SET_UP | RUNNING },
	{ "getpid", NULL, SET_UP | RUNNING },
	{ "gettid", NULL, RUNNING },
	{ "tgkill", NULL, RUNNING },
	{ "rt_sigtimedwait", NULL, RUNNING },
	{ "rt_sigprocmask", NULL, RUNNING },
	{ "process_vm_readv", NULL, RUNNING },
	{ "process_vm_writev", NULL, SET_UP | RUNNING },
	{ "madvise", NULL, SET_UP | RUNNING },
	{ "munmap", NULL, SET_UP | RUNNING },
	{ "mremap", NULL, SET_UP | RUNNING },
	{ "munlock", NULL, SET_UP | RUNNING },
	{ "mincore", NULL, SET_UP },
	{ "openat", NULL, SET_UP | RUNNING },
	{ "readlink", NULL, SET_UP | RUNNING },
	{ "close", NULL, SET_UP | RUNNING },
	{ "fcntl", NULL, SET_UP | RUNNING },
	{ "newfstatat", "fstat", SET_UP | RUNNING },
	{ "fstat", NULL, SET_UP | RUNNING },
	{ "statx", "fstat", SET_UP | RUNNING },
	{ "fstatfs", NULL, SET_UP },
	{ "lseek", NULL, SET_UP | RUNNING },
	{ "pread64", "reading", SET_UP | RUNNING },
	{ "pwrite64", "writing", RUNNING },
	{ "ftruncate", "writing", RUNNING },
	{ "eventfd2", "eventfd", SET_UP },
	{ "userfaultfd", NULL, SET_UP },
	{ "prctl", NULL, SET_UP | RUNNING },
	{ "sched_getaffinity", NULL, SET_UP | RUNNING },
	{ "sched_yield", NULL, RUNNING },
	{ "setpriority", NULL, RUNNING },
	{ "uname", NULL, SET_UP },
};

static void refused(void)
{
	char text[2000];
	unsigned harmless = 0, named = 0;
	require_interruptible_sleep(); /* without read a vCPU that sleeps must be told */
	for (size_t n = 0; n < sizeof(refusals) / sizeof(*refusals); n++)
		for (int when = SET_UP; when <= RUNNING; when *= 2) {
			const char *name = refusals[n].name, *words = refusals[n].words ? refusals[n].words : name;
			const struct call *call = calls;
			if (!(refusals[n].when & when))
				continue;
			while (call < calls + CALLS && strcmp(call->name, name))
				call++;
			CHECK(call < calls + CALLS, "%s is not in the list", name);
			int status = run_without(call, when, text, sizeof(text));
			if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
				skip("%s", text);
			CHECK(!WIFSIGNALED(status), "without %s, phase %d: signal %d: %s", name, when, WTERMSIG(status), text);
			CHECK(status == 0 || strstr(text, words), "without %s, phase %d: %s", name, when, text);
			harmless += status == 0;
			named += status != 0;
		}
	note("%u refusals don't matter, %u are named", harmless, named);
}

/* ---- readers that can't work ---- */

static void *touch_from_the_host(void *arg)
{
	(void)*(volatile uint64_t *)(ram.hva + 5 * PAGE);
	*(atomic_bool *)arg = true;
	return NULL;
}

/* Runs until it is told; what else comes is no more than an interruption. */
static void await_the_news(struct vcpu *v)
{
	int ret;
	do
		ret = kvmfault_vcpu_run(v->handle);
	while (ret == KVMFAULT_INTERRUPTED);
	EQUAL("run", ret, -EPERM);
	CHECK(strstr(kvmfault_last_error(), "reading the userfaultfd"), "the message is: %s", kvmfault_last_error());
}

/*
 * From some time on no reader can read: a host thread waits, and with userfaultfd a vCPU. Every vCPU is told, each time; new memory is refused. The
 * end of the VM releases the host thread.
 */
static void unread_with(const int *refused, size_t count)
{
	pthread_t host;
	atomic_bool done = false;
	require_interruptible_sleep();
	prepare();
	set_up();
	vcpu_attach(machine.vcpu[0]);
	for (size_t n = 0; n < count; n++)
		refuse(refused[n]);
	CHECK(!pthread_create(&host, NULL, touch_from_the_host, &done), "pthread_create");
	struct step *step = steps[0];
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
		step[0] = (struct step){ READ64, RAM_GPA + 9 * PAGE, 0, 0 };
	else
		step[0] = (struct step){ JUMP, steps_gpa[0], 0, 0 };
	step[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(machine.vcpu[0], steps_gpa[0]);
	for (int i = 0; i < 3; i++)
		await_the_news(machine.vcpu[0]);
	EQUAL("the host thread has read", done, false);
	struct ram more;
	ram_create(&more, MEMFD, 4 * PAGE);
	struct kvmfault_memslot slot = slot_on(&more, RAM_SLOT + 1, RAM_GPA + PAGES * PAGE);
	REFUSED(kvmfault_memslot_set(machine.library, &slot), EPERM, "reading the userfaultfd");
	/* What needs no reader works. */
	OK(source_install(&source, machine.library, RAM_GPA + 9 * PAGE, PAGE));
	OK(kvmfault_pages_resolve(machine.library, RAM_GPA + 16 * PAGE, PAGE));
	vcpu_detach(machine.vcpu[0]);
	end();
	pthread_join(host, NULL);
}

static void unread(void)
{
	const int read_only[] = { SYS_read };
	unread_with(read_only, 1);
}

static void unread_unpolled(void)
{
	const int both[] = { SYS_poll, SYS_read };
	unread_with(both, 2);
}

/* Where only poll is refused all goes on. */
static void unpolled(void)
{
	prepare();
	set_up();
	refuse(SYS_poll);
	run();
	end();
}

/* Signals that come by handler are neither blocked nor taken: a filter without these two calls is as good. */
static void refused_by_handler(void)
{
	struct sigaction kick = { .sa_handler = on_kick }, bus = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	by_handler = true;
	SYS(sigaction(SIGUSR1, &kick, NULL));
	SYS(sigaction(SIGBUS, &bus, NULL));
	prepare();
	set_up();
	refuse(SYS_rt_sigtimedwait);
	refuse(SYS_rt_sigprocmask);
	run();
	end();
}

static void listed(void)
{
	static char missing[2000];
	unsigned count = 0;
	prepare();
	note_all();
	phase = SET_UP;
	set_up();
	phase = RUNNING;
	run();
	phase = ENDING;
	end();
	phase = 0;
	for (int when = SET_UP; when <= ENDING; when *= 2)
		for (int number = 0; number < NUMBERS; number++)
			/* Threads of the library may begin late, or be at it still. */
			if (seen[number] & when && !is_listed(number, when | (when == ENDING ? RUNNING : 0)))
				snprintf(missing + strlen(missing), sizeof(missing) - strlen(missing), " %d in phase %d;", number, when);
	for (int n = 0; n < CALLS; n++) {
		count += seen[calls[n].number] != 0;
		if (calls[n].certain == ALWAYS && !(seen[calls[n].number] & calls[n].when))
			snprintf(missing + strlen(missing), sizeof(missing) - strlen(missing), " no %s;", calls[n].name);
	}
	CHECK(!*missing, "the list and what is called differ:%s", missing);
	note("%u of %u listed system calls were made", count, (unsigned)CALLS);
}

static const struct test_case cases[] = {
	{ "enforced", enforced, true },
	{ "enforced_anon", enforced_anon, true },
	{ "narrowed", narrowed, true },
	{ "listed", listed, true },
	{ "refused", refused, true },
	{ "unread", unread, true },
	{ "unread-unpolled", unread_unpolled, true },
	{ "unpolled", unpolled, true },
	{ "refused-by-handler", refused_by_handler, true },
};
TEST_MAIN(cases)
