/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "page-stream.h"
#include "guest.h"
#include "tiny-vm.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* ---- both ends ---- */

static int open_socket(const char *path, struct sockaddr_un *address)
{
	*address = (struct sockaddr_un){ .sun_family = AF_UNIX };
	if (strlen(path) >= sizeof(address->sun_path))
		die(ENAMETOOLONG, "%s", path);
	strcpy(address->sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		die(errno, "a socket");
	return fd;
}

int page_connect(const char *path)
{
	struct sockaddr_un address;
	int fd = open_socket(path, &address);
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0)
		return fd;
	int error = errno;
	close(fd);
	errno = error;
	return -1;
}

bool page_send(int fd, const void *bytes, size_t len)
{
	for (const char *at = bytes; len > 0;) {
		ssize_t n = send(fd, at, len, MSG_NOSIGNAL);
		if (n < 0 && errno != EINTR)
			return false;
		if (n > 0)
			at += n, len -= n;
	}
	return true;
}

bool page_receive(int fd, void *bytes, size_t len)
{
	for (char *at = bytes; len > 0;) {
		ssize_t n = recv(fd, at, len, 0);
		if (n == 0 || (n < 0 && errno != EINTR))
			return false;
		if (n > 0)
			at += n, len -= n;
	}
	return true;
}

/* ---- the server ---- */

struct server {
	int fd;
	struct page_hello hello;
	uint64_t *wanted;   /* pages that this connection still has to send */
	uint64_t next;      /* all pages before this one have been sent, or are not wanted */
	uint64_t die_after; /* pages left to send before it crashes; 0: never */
};

static bool send_page(struct server *s, uint64_t page)
{
	struct {
		struct page_answer answer;
		uint64_t words[GUEST_PAGE_WORDS];
	} message = { .answer = { .page = page } };
	uint64_t bit = 1ull << page % 64;

	if (page >= s->hello.pages || !(s->wanted[page / 64] & bit))
		return true; /* sent already, or not a page of this guest */
	s->wanted[page / 64] &= ~bit;
	if (!guest_is_zero_page(page)) {
		message.answer.len = PAGE_SIZE;
		guest_fill_page(message.words, page);
	}
	if (!page_send(s->fd, &message, sizeof(message.answer) + message.answer.len))
		return false;
	if (s->die_after && --s->die_after == 0)
		raise(SIGKILL);
	return true;
}

/*
 * Answers the requests that have arrived, the last one first: with a real source the answers come
 * out of order, too.
 */
static bool answer_requests(struct server *s)
{
	uint64_t requests[64];
	ssize_t n = recv(s->fd, requests, sizeof(requests), 0);
	/* The last request may have arrived in part. */
	if (n <= 0 || !page_receive(s->fd, (char *)requests + n, -n & 7))
		return false;
	for (ssize_t i = (n + 7) / 8; i-- > 0;)
		if (!send_page(s, requests[i]))
			return false;
	return true;
}

static void serve_connection(struct server *s)
{
	for (bool connected = true; connected;) {
		while (s->next < s->hello.pages && !(s->wanted[s->next / 64] & 1ull << s->next % 64))
			s->next++;
		bool pushes = s->hello.push && s->next < s->hello.pages;
		struct pollfd poll_fd = { .fd = s->fd, .events = POLLIN };
		int ready = poll(&poll_fd, 1, pushes ? 0 : -1);
		if (ready < 0 && errno != EINTR)
			die(errno, "the server's poll");
		if (ready > 0)
			connected = answer_requests(s);
		else if (pushes)
			connected = send_page(s, s->next);
	}
}

void page_serve(const char *path, uint64_t die_after)
{
	struct sockaddr_un address;
	int listener = open_socket(path, &address);

	prctl(PR_SET_PDEATHSIG, SIGKILL); /* do not outlive the VMM that started this process */
	unlink(path);                     /* a server that was killed leaves its socket */
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 1))
		die(errno, "%s", path);
	for (;;) {
		struct server s = { .fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC), .die_after = die_after };
		if (s.fd < 0)
			die(errno, "accept");
		if (page_receive(s.fd, &s.hello, sizeof(s.hello)) && s.hello.pages <= TINY_VM_RAM_MAX / PAGE_SIZE) {
			s.wanted = calloc(PAGE_WORDS(s.hello.pages) + 1, sizeof(uint64_t));
			if (!s.wanted)
				die(errno, "memory for the bitmap");
			if (page_receive(s.fd, s.wanted, PAGE_WORDS(s.hello.pages) * sizeof(uint64_t)))
				serve_connection(&s);
			free(s.wanted);
		}
		close(s.fd);
	}
}
