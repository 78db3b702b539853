/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Each wake-up by itself. The harness keeps sleepers from waking up by themselves
 * (KVMFAULT_TEST_NO_LOOK_AROUND), so that a missing wake-up leaves its sleeper asleep, and the case
 * fails after ten seconds.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Does a thread sleep? What it sleeps in the case knows from what it waited for before. */
static bool is_asleep(int thread)
{
	char path[64], text[256] = "", *end;
	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", thread);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ssize_t got = read(fd, text, sizeof(text) - 1);
	close(fd);
	end = got > 0 ? strrchr(text, ')') : NULL;
	return end && end[1] == ' ' && end[2] == 'S';
}

/* ---- a call that fails while others sleep for its page ---- */

static sem_t fail_now;
static atomic_int begun, results[3], returned[3], thread_of[3];

/* The first call fails when the case says so; each later one installs the page. */
static int fail_first(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	if (begun++ == 0) {
		while (sem_wait(&fail_now))
			;
		return -EIO;
	}
	int ret = source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
	return ret == -EEXIST ? KVMFAULT_RESOLVED : ret;
}

static void set_up(int vcpus)
{
	begun = 0;
	for (int i = 0; i < 3; i++)
		results[i] = returned[i] = thread_of[i] = 0;
	SYS(sem_init(&fail_now, 0, 0));
	resolver_vm_set_up(MEMFD, fail_first, vcpus, 3);
}

static void *read_page_5(struct vcpu *v)
{
	thread_of[v->number] = (int)syscall(SYS_gettid);
	vcpu_attach(v);
	resolver_vm_load_read(v, 5);
	results[v->number] = kvmfault_vcpu_run(v->handle);
	returned[v->number] = 1;
	vcpu_detach(v);
	return NULL;
}

static void *install_page_5(void *arg)
{
	(void)arg;
	thread_of[2] = (int)syscall(SYS_gettid);
	results[2] = kvmfault_pages_resolve(resolver_vm.m.library, RAM_GPA + 5 * PAGE, PAGE);
	returned[2] = 1;
	return NULL;
}

static void *read_from_the_host(void *arg)
{
	EQUAL("the word that the host read", *(volatile uint64_t *)(resolver_vm.ram.hva + 5 * PAGE),
	      pattern_word(&resolver_vm.source.pattern, 5, 0));
	*(atomic_bool *)arg = true;
	return NULL;
}

/*
 * A vCPU's call fails for good. Another vCPU and a thread that wait for the page ask the resolver
 * themselves.
 */
static void failed_call(void)
{
	pthread_t thread;
	require_interruptible_sleep();
	set_up(2);
	vcpu_start(resolver_vm.m.vcpu[0], read_page_5, NULL);
	UNTIL(begun == 1);
	vcpu_start(resolver_vm.m.vcpu[1], read_page_5, NULL);
	CHECK(!pthread_create(&thread, NULL, install_page_5, NULL), "pthread_create");
	if (test_mechanism() != KVMFAULT_MECHANISM_USERFAULTFD)
		UNTIL(machine_stats(&resolver_vm.m).faults_vcpu == 2);
	UNTIL(machine_stats(&resolver_vm.m).faults_prefetch == 1);
	UNTIL(thread_of[1] && is_asleep(thread_of[1]) && is_asleep(thread_of[2]));
	EQUAL("calls", begun, 1);
	sem_post(&fail_now);
	UNTIL(returned[0]);
	/*
	 * In userfaultfd the page wakes the thread, too, if another thread's call installs it
	 * before the error arrives.
	 */
	CHECK(results[0] == -EIO || (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD && results[0] == KVMFAULT_PASS),
	      "the first vCPU's run: %d", results[0]);
	UNTIL(begun == 2);
	UNTIL(returned[1] && returned[2]);
	EQUAL("the second vCPU's run", results[1], KVMFAULT_PASS);
	EQUAL("pages_resolve", results[2], 0);
	resolver_vm_check_read(resolver_vm.m.vcpu[1], 5);
	for (int i = 0; i < 2; i++)
		vcpu_join(resolver_vm.m.vcpu[i]);
	pthread_join(thread, NULL);
	resolver_vm_tear_down();
}

/*
 * A call of kvmfault_pages_resolve fails while a host thread sleeps in userfaultfd for the same
 * page. No reader thread wakes the host thread: the page was not the reader's.
 */
static void failed_prefetch(void)
{
	pthread_t thread, host;
	atomic_bool done = false;
	set_up(0);
	CHECK(!pthread_create(&thread, NULL, install_page_5, NULL), "pthread_create");
	UNTIL(begun == 1);
	CHECK(!pthread_create(&host, NULL, read_from_the_host, &done), "pthread_create");
	UNTIL(machine_stats(&resolver_vm.m).faults_host == 1 && machine_stats(&resolver_vm.m).outcome_waited == 1);
	EQUAL("calls", begun, 1);
	sem_post(&fail_now);
	UNTIL(returned[2]);
	EQUAL("pages_resolve", results[2], -EIO);
	UNTIL(done);
	EQUAL("calls", begun, 2);
	pthread_join(thread, NULL);
	pthread_join(host, NULL);
	resolver_vm_tear_down();
}

/* ---- kicks of a vCPU that sleeps for an announced page ---- */

static struct vcpu *the;

static void *wait_for_page_5(struct vcpu *v)
{
	uint32_t value;
	if (v->opaque)
		vcpu_attach_by_handler(v, 0);
	else
		vcpu_attach(v);
	resolver_vm_load_read(v, 5);
	thread_of[0] = (int)syscall(SYS_gettid);
	results[0] = kvmfault_vcpu_run(v->handle);
	returned[0] = 1;
	/* By handler the signal may come after its kick was seen. */
	do
		results[1] = kvmfault_vcpu_run(v->handle);
	while (v->opaque && results[1] == KVMFAULT_INTERRUPTED);
	CHECK(results[1] == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, results[1]));
	returned[1] = 1;
	vcpu_detach(v);
	return NULL;
}

static void kick_a_sleeper(void *by_handler)
{
	for (int i = 0; i < 3; i++)
		results[i] = returned[i] = thread_of[i] = 0;
	require_interruptible_sleep();
	resolver_vm_set_up(MEMFD, resolver_vm_answer_pending, 1, 3);
	the = resolver_vm.m.vcpu[0];
	vcpu_start(the, wait_for_page_5, by_handler);
	UNTIL(resolver_vm.calls == 1 &&
	      kvmfault_pages_state(resolver_vm.m.library, RAM_GPA + 5 * PAGE) == KVMFAULT_PAGE_RESOLVING);
	UNTIL(is_asleep(thread_of[0]));
	EQUAL("the vCPU has returned", returned[0], 0);
	OK(kvmfault_vcpu_kick(the->handle));
	UNTIL(returned[0]);
	EQUAL("run", results[0], KVMFAULT_INTERRUPTED);
	resolver_vm_install(5);
	UNTIL(returned[1]);
	vcpu_join(the);
	resolver_vm_check_read(the, 5);
	resolver_vm_tear_down();
}

/* The signal is blocked outside of KVM_RUN: the futex alone wakes the vCPU. */
static void kicked(void)
{
	kick_a_sleeper(NULL);
}

static void kicked_by_handler(void)
{
	kick_a_sleeper(&the);
}

static const struct test_case cases[] = {
	{ "failed-call", failed_call, true },
	{ "failed-prefetch", failed_prefetch, true },
	{ "kicked", kicked, true },
	{ "kicked-by-handler", kicked_by_handler, true },
};
TEST_MAIN(cases)
