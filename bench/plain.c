/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * userfaultfd in plain C: one reader thread, or one for each vCPU, and pages one by one or so many
 * around the one that is needed.
 */
#define _GNU_SOURCE
#include "ways.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

struct plain {
	int uffd, stop[2]; /* stop: a pipe, for its hangup */
	struct job *job;
	unsigned readers;
	pthread_t thread[MOST_VCPUS];
};

int open_userfaultfd(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0) {
		int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		fd = device < 0 ? -1 : ioctl(device, _IO(0xAA, 0x00), O_CLOEXEC | O_NONBLOCK);
		close(device);
	}
	CHECK(fd >= 0,
	      "userfaultfd: %s (as root, or vm.unprivileged_userfaultfd=1, or permission for /dev/userfaultfd)",
	      strerror(errno));
	SYS(ioctl(fd, UFFDIO_API, &api));
	return fd;
}

void register_memory(int uffd, const void *address, uint64_t len, uint64_t mode)
{
	struct uffdio_register reg = { .range = { (uintptr_t)address, len }, .mode = mode };
	SYS(ioctl(uffd, UFFDIO_REGISTER, &reg));
}

/* Brings an aligned batch; pages of it that are there already are skipped. */
static void bring(const struct plain *p, uint64_t address)
{
	uint64_t len = p->job->way->batch * p->job->ram.page, base = (uintptr_t)p->job->ram.hva;
	uint64_t at = base + (address - base) / len * len, end = at + len;
	end = end < base + p->job->ram.len ? end : base + p->job->ram.len;
	while (at < end) {
		struct uffdio_copy copy = { .dst = at, .src = (uintptr_t)source_bytes, .len = end - at };
		struct uffdio_range page = { at, p->job->ram.page };
		if (ioctl(p->uffd, UFFDIO_COPY, &copy) == 0)
			return;
		if (errno == EAGAIN) {
			at += copy.copy > 0 ? copy.copy : 0;
		} else {
			/* Two vCPUs wanted it: the second message finds the page there. */
			CHECK(errno == EEXIST, "UFFDIO_COPY: %s", strerror(errno));
			SYS(ioctl(p->uffd, UFFDIO_WAKE, &page));
			at += p->job->ram.page;
		}
	}
}

static void *read_faults(void *arg)
{
	struct plain *p = arg;
	struct pollfd fds[2] = { { .fd = p->uffd, .events = POLLIN }, { .fd = p->stop[0], .events = POLLIN } };
	struct uffd_msg message;
	for (;;) {
		if (poll(fds, 2, -1) < 0 || fds[1].revents)
			return NULL;
		while (read(p->uffd, &message, sizeof(message)) == sizeof(message))
			bring(p, message.arg.pagefault.address & -PAGE);
	}
}

void plain_begin(struct job *job)
{
	struct plain *p = job->own = calloc(1, sizeof(*p));
	CHECK(p, "no memory");
	p->job = job;
	p->uffd = open_userfaultfd();
	p->readers = job->way->many ? job->vcpus : 1;
	SYS(pipe2(p->stop, O_CLOEXEC));
	register_memory(p->uffd, job->ram.hva, job->ram.len, UFFDIO_REGISTER_MODE_MISSING);
	set_plain_slot(job, job->ram.hva);
	for (unsigned i = 0; i < p->readers; i++)
		CHECK(!pthread_create(&p->thread[i], NULL, read_faults, p), "pthread_create");
}

void plain_end(struct job *job)
{
	struct plain *p = job->own;
	close(p->stop[1]); /* a hangup, which poll reports */
	for (unsigned i = 0; i < p->readers; i++)
		pthread_join(p->thread[i], NULL);
	close(p->stop[0]);
	close(p->uffd);
	free(p);
}
