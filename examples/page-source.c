/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pages over a socket. Two sides meet in the library:
 *
 *   page_source_resolve   runs on the thread that faults. It sends a request and returns
 *                         KVMFAULT_PENDING at once: the page is then announced, and threads that
 *                         need it sleep in the library, where a kick can wake them. It never
 *                         waits for the server.
 *   receive               one thread of the VMM. It installs pages in the order in which they
 *                         arrive, requested or not, and so wakes the sleepers.
 *
 * When the connection breaks, the pages that were announced over it will not arrive. The receiving
 * thread connects again, and then withdraws them (kvmfault_pages_withdraw): those pages are absent
 * again, and the sleepers request them over the new connection. The guest notices only a pause.
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

/* Seconds to look for a server, before the missing pages are marked lost. */
#define GIVE_UP_AFTER 30.0

int page_source_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct page_source *s = opaque;
	uint64_t page = (fault->gpa - s->gpa) / PAGE_SIZE;

	(void)vm;
	pthread_mutex_lock(&s->lock); /* several vCPUs send, and a request must stay whole */
	/*
	 * Without a connection the page is announced all the same. It is requested when there is
	 * one again.
	 */
	if (s->fd >= 0 && page_send(s->fd, &page, sizeof(page)))
		s->asked++;
	pthread_mutex_unlock(&s->lock);
	return KVMFAULT_PENDING; /* correct even if the page has arrived meanwhile */
}

/* Sends requests to this socket from now on; -1: to none. */
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

/* Returns -1 if there was no server in time, or if page_source_stop was called. */
static int find_server(struct page_source *s)
{
	for (double end = seconds_now() + GIVE_UP_AFTER; seconds_now() < end && !is_stopping(s); usleep(10000)) {
		int fd = page_connect(s->path);
		if (fd >= 0)
			return fd;
	}
	return -1;
}

/* Tells the server which pages are missing: at first all, later those that have not arrived yet. */
static bool say_hello(struct page_source *s, int fd)
{
	struct page_hello hello = { .pages = s->pages, .push = s->push };
	uint64_t *wanted = calloc(PAGE_WORDS(s->pages), sizeof(uint64_t));
	if (!wanted)
		die(errno, "memory for a bitmap");
	if (kvmfault_pages_bitmap(s->vm, s->gpa, s->pages * PAGE_SIZE, KVMFAULT_STATE_ABSENT | KVMFAULT_STATE_RESOLVING,
				  wanted, PAGE_WORDS(s->pages) * sizeof(uint64_t)) < 0)
		die(0, "the states of the pages: %s", kvmfault_last_error());
	bool said =
		page_send(fd, &hello, sizeof(hello)) && page_send(fd, wanted, PAGE_WORDS(s->pages) * sizeof(uint64_t));
	free(wanted);
	return said;
}

/* Installs the pages that arrive, until the connection breaks. */
static void install_pages(struct page_source *s, int fd, double broke)
{
	uint8_t bytes[PAGE_SIZE];
	struct page_answer answer;

	while (page_receive(fd, &answer, sizeof(answer))) {
		uint64_t gpa = s->gpa + answer.page * PAGE_SIZE;
		/* Never trust the other end. */
		if (answer.page >= s->pages || (answer.len != 0 && answer.len != PAGE_SIZE))
			break;
		if (!page_receive(fd, bytes, answer.len))
			break; /* a part of a page is useless */
		int ret = answer.len ? kvmfault_pages_install(s->vm, gpa, bytes, PAGE_SIZE)
				     : kvmfault_pages_zero(s->vm, gpa, PAGE_SIZE);
		if (ret < 0 && ret != -EEXIST) /* it is present already */
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
		/*
		 * In this order: the server learns which pages are missing before the first
		 * request, and withdrawn pages are requested at once.
		 */
		if (say_hello(s, fd)) {
			use_connection(s, fd);
			s->connections++;
			/*
			 * The first time, too: pages that vCPUs needed before the connection have
			 * not been requested.
			 */
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
	/*
	 * There is no source for the pages: a memory error in the guest is better than an endless
	 * sleep.
	 */
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
