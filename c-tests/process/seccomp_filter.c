/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "seccomp_filter.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

const struct seccomp_call seccomp_calls[SECCOMP_CALLS_LISTED] = {
#define CALL(name, when, certain) { #name, SYS_##name, when, certain },
	SECCOMP_CALLS(CALL)
#undef CALL
};

/* What only the tests call, beside the guest's run. */
static const int harness_calls[] = { SYS_write, SYS_exit_group };
enum { HARNESS_CALLS = sizeof(harness_calls) / sizeof(*harness_calls) };

bool seccomp_is_listed(int number, int when)
{
	for (int n = 0; n < HARNESS_CALLS; n++)
		if (harness_calls[n] == number)
			return true;
	for (int n = 0; n < SECCOMP_CALLS_LISTED; n++)
		if (seccomp_calls[n].number == number && seccomp_calls[n].when & when)
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

void seccomp_allow_listed(int when)
{
	static struct sock_filter filter[4 + 2 * (SECCOMP_CALLS_LISTED + HARNESS_CALLS)];
	unsigned short n = 0;
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
	for (int number = 0; number < SECCOMP_NUMBERS; number++)
		if (seccomp_is_listed(number, when)) {
			filter[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1);
			filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
		}
	filter[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	filter_all(filter, n, 0, NULL);
}

/* ---- noting what is called ---- */

atomic_int seccomp_phase;
atomic_uchar seccomp_seen[SECCOMP_NUMBERS]; /* in which phases */
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
		if (request.data.nr >= 0 && request.data.nr < SECCOMP_NUMBERS)
			seccomp_seen[request.data.nr] |= seccomp_phase;
		struct seccomp_notif_resp response = { .id = request.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE };
		/* the thread may have been killed, or have got a signal */
		ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response);
	}
}

static void *wait_then_watch(void *opaque)
{
	while (listener < 0)
		usleep(1000);
	return watch(opaque);
}

void seccomp_note_all(void)
{
	static struct sock_filter filter[] = { BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF) };
	/*
	 * The one call that this thread must make before the other one has the listener: what is
	 * written for the compiler is no call.
	 */
	pthread_t thread;
	int made;
	CHECK(!pthread_create(&thread, NULL, wait_then_watch, NULL), "pthread_create");
	pthread_detach(thread);
	filter_all(filter, 1, SECCOMP_FILTER_FLAG_NEW_LISTENER, &made);
	listener = made;
}

void seccomp_refuse(int number)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	filter_all(filter, 4, SECCOMP_FILTER_FLAG_TSYNC, NULL);
}
