/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * poison-trap by hand: UFFDIO_POISON markers on absent pages, SIGBUS blocked outside of KVM_RUN and
 * fetched with sigtimedwait, UFFDIO_COPY on the vCPU's thread; shared memory by a second mapping
 * that only KVM uses. No page states, no kicks, no errors, no host accesses: nothing but the
 * mechanism, against which the library's cost is measured.
 */
#define _GNU_SOURCE
#include "ways.h"

#include <errno.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* Linux 6.6; not in the headers of Debian 12. */
#ifndef UFFDIO_POISON
struct uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

struct trap {
	int uffd;
	uint8_t *kvm; /* where KVM finds the memory */
};

void trap_begin(struct job *job)
{
	struct trap *t = job->own = calloc(1, sizeof(*t));
	CHECK(t, "no memory");
	t->uffd = open_userfaultfd();
	t->kvm = job->ram.hva;
	register_memory(t->uffd, job->ram.hva, job->ram.len, UFFDIO_REGISTER_MODE_MISSING);
	if (job->ram.fd >= 0) {
		t->kvm = mmap(NULL, job->ram.len, PROT_READ | PROT_WRITE, MAP_SHARED, job->ram.fd, 0);
		CHECK(t->kvm != MAP_FAILED, "mmap: %s", strerror(errno));
		register_memory(t->uffd, t->kvm, job->ram.len,
				UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	}
	for (uint64_t at = 0; at < job->ram.len;) {
		struct uffdio_poison poison = { .range = { (uintptr_t)t->kvm + at, job->ram.len - at } };
		if (ioctl(t->uffd, UFFDIO_POISON, &poison) == 0)
			break;
		CHECK(errno == EAGAIN, "UFFDIO_POISON: %s", strerror(errno));
		at += poison.updated > 0 ? poison.updated : 0;
	}
	set_plain_slot(job, t->kvm);
}

void trap_attach(struct job *job, struct vcpu *v)
{
	sigset_t set;
	struct {
		struct kvm_signal_mask head;
		uint8_t mask[8];
	} in_guest = { { .len = 8 }, { 0 } };
	(void)job;
	sigemptyset(&set);
	sigaddset(&set, SIGBUS);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	SYS(ioctl(v->fd, KVM_SET_SIGNAL_MASK, &in_guest));
}

/* Brings an aligned batch. */
static void bring(const struct job *job, const struct trap *t, uint64_t address)
{
	uint64_t len = job->way->batch * job->ram.page, offset = (address - (uintptr_t)t->kvm) / len * len;
	len = offset + len < job->ram.len ? len : job->ram.len - offset;
	for (uint64_t done = 0; done < len;) {
		struct uffdio_copy copy = {
			.dst = (uintptr_t)job->ram.hva + offset + done,
			.src = (uintptr_t)source_bytes,
			.len = len - done,
			.mode = UFFDIO_COPY_MODE_DONTWAKE,
		};
		if (ioctl(t->uffd, UFFDIO_COPY, &copy) == 0)
			break;
		CHECK(errno == EAGAIN || errno == EEXIST, "UFFDIO_COPY: %s", strerror(errno));
		done += copy.copy > 0 ? (uint64_t)copy.copy : errno == EEXIST ? job->ram.page : 0;
	}
	for (uint64_t done = 0; t->kvm != job->ram.hva && done < len;) {
		struct uffdio_continue map = {
			.range = { (uintptr_t)t->kvm + offset + done, len - done },
			.mode = UFFDIO_CONTINUE_MODE_DONTWAKE,
		};
		if (ioctl(t->uffd, UFFDIO_CONTINUE, &map) == 0)
			break;
		CHECK(errno == EAGAIN || errno == EEXIST, "UFFDIO_CONTINUE: %s", strerror(errno));
		done += map.mapped > 0 ? (uint64_t)map.mapped : errno == EEXIST ? job->ram.page : 0;
	}
}

void trap_run(struct job *job, struct vcpu *v)
{
	const struct timespec none = { 0 };
	siginfo_t info;
	sigset_t set;
	uint32_t value;
	sigemptyset(&set);
	sigaddset(&set, SIGBUS);
	while (ioctl(v->fd, KVM_RUN, 0) < 0) {
		CHECK(errno == EINTR, "KVM_RUN: %s", strerror(errno));
		CHECK(sigtimedwait(&set, &info, &none) == SIGBUS, "KVM_RUN was interrupted by something else");
		bring(job, job->own, (uintptr_t)info.si_addr);
	}
	CHECK(vcpu_stopped(v, &value), "unexpected exit %u", v->run->exit_reason);
}

void trap_end(struct job *job)
{
	struct trap *t = job->own;
	close(t->uffd);
	if (t->kvm != job->ram.hva)
		munmap(t->kvm, job->ram.len);
	free(t);
}
