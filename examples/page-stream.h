/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The protocol between the two processes of page-server, and the server.
 *
 * The VMM begins: it sends a struct page_hello, then a bitmap of the pages that it wants (bit p %
 * 64 of word p / 64). After that it sends requests: the number of a page, 64 bits.
 *
 * The server sends pages: for each a struct page_answer, then the bytes. Requested pages come
 * before others, in any order. Each page comes once in a connection, so a request that crosses
 * its page needs no further answer.
 */
#ifndef PAGE_STREAM_H
#define PAGE_STREAM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct page_hello {
	uint64_t pages; /* of guest memory */
	uint64_t push;  /* 1: also send pages without a request, as post-copy migration does */
};

struct page_answer {
	uint64_t page;
	uint64_t len; /* bytes that follow: a page, or none for a page of zeros */
};

/* The number of words in a bitmap. */
#define PAGE_WORDS(pages) (((pages) + 63) / 64)

/* Returns a socket that is connected to the server at `path`, or -1 with errno. */
int page_connect(const char *path);

/* Transfer all `len` bytes. Return false if the other end has closed the connection. */
bool page_send(int fd, const void *bytes, size_t len);
bool page_receive(int fd, void *bytes, size_t len);

/*
 * Serves the guest's pages at `path`, one connection at a time, until it is killed. It kills itself
 * after `die_after` pages, like a server that crashes; 0: never.
 */
void page_serve(const char *path, uint64_t die_after) __attribute__((noreturn));

#endif
