/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A filter that refuses one call of docs/seccomp.md: either it does not matter, or an error names
 * the call; and readers that cannot read.
 */
#define _GNU_SOURCE
#include "seccomp_filter.h"
#include "seccomp_run.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* What became of a run without a call: 0, or what is on the way out in `text`. */
static int run_without(const struct seccomp_call *call, int when, char *text, size_t size)
{
	int output[2], status;
	size_t length = 0;
	SYS(pipe(output));
	fflush(NULL);
	pid_t child = SYS(fork());
	if (!child) {
		dup2(output[1], 1);
		alarm(60);
		seccomp_run_prepare();
		if (when == SET_UP)
			seccomp_refuse(call->number);
		seccomp_run_set_up();
		seccomp_run.host_waits = when == RUNNING && call->number == SYS_read;
		if (when == RUNNING)
			seccomp_refuse(call->number);
		seccomp_run_guest();
		seccomp_run_end();
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
 * Calls of which a refusal (EPERM) either doesn't matter or comes as an error that names it, from
 * the time on when the filter is there. Not here: what the C library needs to have threads (futex,
 * rseq, mmap, mprotect, clone3, exit).
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
	require_interruptible_sleep(); /* without read a sleeping vCPU must be interrupted */
	for (size_t n = 0; n < sizeof(refusals) / sizeof(*refusals); n++)
		for (int when = SET_UP; when <= RUNNING; when *= 2) {
			const char *name = refusals[n].name, *words = refusals[n].words ? refusals[n].words : name;
			const struct seccomp_call *call = seccomp_calls;
			if (!(refusals[n].when & when))
				continue;
			while (call < seccomp_calls + SECCOMP_CALLS_LISTED && strcmp(call->name, name))
				call++;
			CHECK(call < seccomp_calls + SECCOMP_CALLS_LISTED, "%s is not in the list", name);
			int status = run_without(call, when, text, sizeof(text));
			if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
				skip("%s", text);
			CHECK(!WIFSIGNALED(status), "without %s, phase %d: signal %d: %s", name, when, WTERMSIG(status),
			      text);
			CHECK(status == 0 || strstr(text, words), "without %s, phase %d: %s", name, when, text);
			harmless += status == 0;
			named += status != 0;
		}
	note("%u refusals don't matter, %u are named", harmless, named);
}

/* ---- readers that can't work ---- */

static void *touch_from_the_host(void *arg)
{
	(void)*(volatile uint64_t *)(seccomp_run.ram.hva + 5 * PAGE);
	*(atomic_bool *)arg = true;
	return NULL;
}

/* Runs until it gets the error; before that the run may only be interrupted. */
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
 * At some time the readers can no longer read: a host thread waits, and with userfaultfd a vCPU.
 * Each run of each vCPU returns the error; new memory is refused. The end of the VM releases the
 * host thread.
 */
static void unread_with(const int *refused, size_t count)
{
	pthread_t host;
	atomic_bool done = false;
	require_interruptible_sleep();
	seccomp_run_prepare();
	seccomp_run_set_up();
	vcpu_attach(seccomp_run.machine.vcpu[0]);
	for (size_t n = 0; n < count; n++)
		seccomp_refuse(refused[n]);
	CHECK(!pthread_create(&host, NULL, touch_from_the_host, &done), "pthread_create");
	struct step *step = seccomp_run.steps[0];
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
		step[0] = (struct step){ READ64, RAM_GPA + 9 * PAGE, 0, 0 };
	else
		step[0] = (struct step){ JUMP, seccomp_run.steps_gpa[0], 0, 0 };
	step[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(seccomp_run.machine.vcpu[0], seccomp_run.steps_gpa[0]);
	for (int i = 0; i < 3; i++)
		await_the_news(seccomp_run.machine.vcpu[0]);
	EQUAL("the host thread has read", done, false);
	struct ram more;
	ram_create(&more, MEMFD, 4 * PAGE);
	struct kvmfault_memslot slot = slot_on(&more, RAM_SLOT + 1, RAM_GPA + PAGES * PAGE);
	REFUSED(kvmfault_memslot_set(seccomp_run.machine.library, &slot), EPERM, "reading the userfaultfd");
	/* What needs no reader works. */
	OK(source_install(&seccomp_run.source, seccomp_run.machine.library, RAM_GPA + 9 * PAGE, PAGE));
	OK(kvmfault_pages_resolve(seccomp_run.machine.library, RAM_GPA + 16 * PAGE, PAGE));
	vcpu_detach(seccomp_run.machine.vcpu[0]);
	seccomp_run_end();
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

/* Where only poll is refused, all works. */
static void unpolled(void)
{
	seccomp_run_prepare();
	seccomp_run_set_up();
	seccomp_refuse(SYS_poll);
	seccomp_run_guest();
	seccomp_run_end();
}

/*
 * Signals that come by handler are neither blocked nor taken: a filter without these two calls is
 * as good.
 */
static void refused_by_handler(void)
{
	seccomp_run_by_handler();
	seccomp_run_prepare();
	seccomp_run_set_up();
	seccomp_refuse(SYS_rt_sigtimedwait);
	seccomp_refuse(SYS_rt_sigprocmask);
	seccomp_run_guest();
	seccomp_run_end();
}

static const struct test_case cases[] = {
	{ "refused", refused, true },
	{ "unread", unread, true },
	{ "unread-unpolled", unread_unpolled, true },
	{ "unpolled", unpolled, true },
	{ "refused-by-handler", refused_by_handler, true },
};
TEST_MAIN(cases)
