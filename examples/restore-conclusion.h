/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the results of lazy-restore show, in words.
 */
#ifndef RESTORE_CONCLUSION_H
#define RESTORE_CONCLUSION_H

#include "restore-table.h"

/* Prints nothing if a row is missing that the others are compared with, or a page was wrong. */
void conclusion_print(const struct result *results, size_t count);

#endif
