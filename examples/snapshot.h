/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The snapshot that lazy-restore restores: a file with the guest's pages. It is in the page cache
 * when it has been written, so that reading it costs no disk access.
 */
#ifndef SNAPSHOT_H
#define SNAPSHOT_H

#include <stddef.h>
#include <stdint.h>

/*
 * Writes the pages that the guest expects; its zero pages become holes of the file. Returns a
 * descriptor. The file has no name, and vanishes with its descriptor. Its directory is $TMPDIR, or
 * /var/tmp.
 */
int snapshot_write(uint64_t size);

/* Changes a byte, so that the page that it is in is wrong. */
void snapshot_damage(int fd, uint64_t offset);

/* Reads the whole snapshot, as a VMM does without lazy restore. */
void snapshot_read(int fd, void *memory, uint64_t size);

#endif
