/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "snapshot.h"
#include "guest.h"
#include "tiny-vm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int snapshot_write(uint64_t size)
{
	const char *directory = getenv("TMPDIR");
	char path[4096];
	snprintf(path, sizeof(path), "%s/lazy-restore-XXXXXX", directory ? directory : "/var/tmp");
	int fd = mkostemp(path, O_CLOEXEC);
	if (fd < 0)
		die(errno, "%s can't be created (set TMPDIR to another directory)", path);
	unlink(path);
	if (ftruncate(fd, size))
		die(errno, "a snapshot of %lu MiB", (unsigned long)(size >> 20));
	for (uint64_t page = 0; page < size / PAGE_SIZE; page++) {
		uint64_t words[GUEST_PAGE_WORDS];
		guest_fill_page(words, page);
		if (!guest_is_zero_page(page) && pwrite(fd, words, PAGE_SIZE, page * PAGE_SIZE) != PAGE_SIZE)
			die(errno, "writing the snapshot (set TMPDIR to a directory with more room)");
	}
	return fd;
}

void snapshot_damage(int fd, uint64_t offset)
{
	uint8_t byte;
	if (pread(fd, &byte, 1, offset) != 1)
		die(errno, "reading the byte to change");
	byte ^= 1;
	if (pwrite(fd, &byte, 1, offset) != 1)
		die(errno, "changing a byte of the snapshot");
}

void snapshot_read(int fd, void *memory, uint64_t size)
{
	for (uint64_t done = 0; done < size;) {
		ssize_t n = pread(fd, (char *)memory + done, size - done, done);
		if (n == 0 || (n < 0 && errno != EINTR))
			die(n ? errno : EIO, "reading the snapshot");
		if (n > 0)
			done += n;
	}
}
