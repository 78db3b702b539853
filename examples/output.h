/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * How the examples show what they do: a progress line on a terminal, and results for programs.
 */
#ifndef OUTPUT_H
#define OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

/* Whether there is a progress line: not if the output goes to a file or to another program. */
bool progress_is_shown(void);
/* Replaces the progress line. Does nothing where none is shown. */
void progress_show(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Removes it, for what is printed next. */
void progress_clear(void);

/*
 * Writes a JSON list to a file: `write` prints result `n` of `results`, without a line end. Ends
 * the program if the file can't be written.
 */
void write_json_list(const char *path, const void *results, size_t count,
		     void (*write)(FILE *file, const void *results, size_t n));

#endif
