/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What goes over the socket between page-server's two processes, and the server's own part of it.
 *
 * The VMM begins: struct page_hello, then a bitmap of the pages that it wants (bit p % 64 of word p / 64). After that it sends requests: the
 * number of a page, 64 bits. The server sends pages, those that were asked for before others, in whatever order suits it: struct page_answer,
 * then the bytes. Each page comes once in a connection, so a request for one that is on its way already needs no answer of its own.
 */
#ifndef PAGE_STREAM_H
#define PAGE_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct page_hello {
	uint64_t pages; /* of guest memory */
	uint64_t push;  /* 1: send what nobody has asked for, too, as a post-copy does */
};

struct page_answer {
	uint64_t page;
	uint64_t len; /* bytes that follow: a page's, or none for a page of zeros */
};

/* The words of a bitmap. */
#define PAGE_WORDS(pages) (((pages) + 63) / 64)

/* A socket, connected to the server at `path`; or -1 and errno. */
int page_connect(const char *path);

/* All of it, or false: the other end is gone. */
bool page_send(int fd, const void *bytes, size_t len);
bool page_receive(int fd, void *bytes, size_t len);

/*
 * Serves the guest's pages at `path`, a connection at a time, until it is killed. With `die_after` it kills itself after so many pages, as a
 * server would that crashes; 0: never.
 */
void page_serve(const char *path, uint64_t die_after) __attribute__((noreturn));

#endif
