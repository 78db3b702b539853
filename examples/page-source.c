/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pages over a socket. Two sides meet in the library:
 *
 *   page_source_resolve   runs on the thread that faults. It sends a request and returns KVMFAULT_PENDING at once: the page is announced, and
 *                         whoever needs it sleeps in the library, where a kick finds it. It never waits for the server.
 *   receive               one thread of ours. It installs pages in the order in which they come, asked for or not; that wakes the sleepers.
 *
 * When the connection breaks, what was announced over it won't come. The receiving thread connects again, and then withdraws it
 * (kvmfault_pages_withdraw): those pages are absent again, and the sleepers ask for them anew, over the new connection. The guest notices
 * nothing but a pause.
 */
#define _GNU_SOURCE
#include "clock.h"
#include "page-source.h"
#include "page-stream.h"
#include "tiny-vm.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

/* How long to look for a server before the guest's pages are given up. */
#define GIVE_UP_AFTER 30.0

int page_source_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct page_source *s = opaque;
	uint64_t page = (fault->gpa - s->gpa) / PAGE_SIZE;

	(void)vm;
	pthread_mutex_lock(&s->lock); /* several vCPUs send; a request must not be cut in two */
	/* Without a connection there is nothing to send to: the page is announced all the same, and asked for when there is one again. */
	if (s->fd >= 0 && page_send(s->fd, &page, sizeof(page)))
		s->asked++;
	pthread_mutex_unlock(&s->lock);
	return KVMFAULT_PENDING; /* the page may be there by now: that is all right */
}

/* From now on requests go to this socket; -1: nowhere. */
static void use_connection(struct page_source *s, int fd)
{
	pthread_mutex_lock(&s->lock);
	s->fd = fd;
	if (s->stops && fd >= 0)
		shutdown(fd, SHUT_RDWR); /* page_source_stop came before this connection */
	pthread_mutex_unlock(&s->lock);
}

static bool is_stopping(struct page_source *s)
{
	pthread_mutex_lock(&s->lock);
	bool stops = s->stops;
	pthread_mutex_unlock(&s->lock);
	return stops;
}

/* Returns -1 if no server was found in time, or none is looked for any more. */
static int find_server(struct page_source *s)
{
	for (double end = seconds_now() + GIVE_UP_AFTER; seconds_now() < end && !is_stopping(s); usleep(10000)) {
		int fd = page_connect(s->path);
		if (fd >= 0)
			return fd;
	}
	return -1;
}

/* Tells the server which pages are missing: at first all of them, after a break those that had not come. */
static bool say_hello(struct page_source *s, int fd)
{
	struct page_hello hello = { .pages = s->pages, .push = s->push };
	uint64_t *wanted = calloc(PAGE_WORDS(s->pages), sizeof(uint64_t));
	if (!wanted)
		die(errno, "memory for a bitmap");
	if (kvmfault_pages_bitmap(s->vm, s->gpa, s->pages * PAGE_SIZE, KVMFAULT_STATE_ABSENT | KVMFAULT_STATE_RESOLVING, wanted,
				  PAGE_WORDS(s->pages) * sizeof(uint64_t)) < 0)
		die(0, "the states of the pages: %s", kvmfault_last_error());
	bool said = page_send(fd, &hello, sizeof(hello)) && page_send(fd, wanted, PAGE_WORDS(s->pages) * sizeof(uint64_t));
	free(wanted);
	return said;
}

/* Installs what comes, until the connection breaks. */
static void install_pages(struct page_source *s, int fd, double broke)
{
	uint8_t bytes[PAGE_SIZE];
	struct page_answer answer;

	while (page_receive(fd, &answer, sizeof(answer))) {
		uint64_t gpa = s->gpa + answer.page * PAGE_SIZE;
		/* Never believe the other end. */
		if (answer.page >= s->pages || (answer.len != 0 && answer.len != PAGE_SIZE))
			break;
		if (!page_receive(fd, bytes, answer.len))
			break; /* half a page is none */
		int ret = answer.len ? kvmfault_pages_install(s->vm, gpa, bytes, PAGE_SIZE) : kvmfault_pages_zero(s->vm, gpa, PAGE_SIZE);
		if (ret < 0 && ret != -EEXIST) /* it is there already: nothing to do */
			die(0, "page %llu: %s", (unsigned long long)answer.page, kvmfault_last_error());
		s->received++;
		if (broke > 0 && seconds_now() - broke > s->gap)
			s->gap = seconds_now() - broke;
		broke = 0;
	}
}

static void *receive(void *arg)
{
	struct page_source *s = arg;
	double broke = 0;

	for (int fd; (fd = find_server(s)) >= 0;) {
		/* In this order: the server must know what is wanted before the first request, and what is withdrawn is asked for at once. */
		if (say_hello(s, fd)) {
			use_connection(s, fd);
			s->connections++;
			/* The first time, too: what vCPUs needed before there was a connection was announced, and asked of nobody. */
			int64_t withdrawn = kvmfault_pages_withdraw(s->vm, s->gpa, s->pages * PAGE_SIZE);
			if (withdrawn < 0)
				die(0, "withdrawing pages: %s", kvmfault_last_error());
			s->withdrawn += withdrawn;
			install_pages(s, fd, broke);
			use_connection(s, -1);
			broke = seconds_now();
		}
		close(fd);
	}
	/* The pages can't be had: better a memory error in the guest than a vCPU that sleeps for ever. */
	if (!is_stopping(s))
		kvmfault_pages_lost(s->vm, s->gpa, s->pages * PAGE_SIZE);
	return NULL;
}

void page_source_init(struct page_source *s)
{
	pthread_mutex_init(&s->lock, NULL);
	s->fd = -1;
}

void page_source_start(struct page_source *s, struct kvmfault_vm *vm)
{
	s->vm = vm;
	int error = pthread_create(&s->receiver, NULL, receive, s);
	if (error)
		die(error, "a thread that receives pages");
}

void page_source_stop(struct page_source *s)
{
	pthread_mutex_lock(&s->lock);
	s->stops = true;
	if (s->fd >= 0)
		shutdown(s->fd, SHUT_RDWR); /* the receiving thread sees an end */
	pthread_mutex_unlock(&s->lock);
	pthread_join(s->receiver, NULL);
}
