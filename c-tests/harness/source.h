/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What test memory is to hold (a pattern by page number), and resolvers that install it: at once
 * (source), or for some pages later, from another thread.
 */
#ifndef SOURCE_H
#define SOURCE_H

#include "ram.h"

#include <pthread.h>
#include <stdatomic.h>

/*
 * Word w of page p (4 KiB, 512 words) is (p + 1) * factor + w, or zero if zero_mask != 0 and (p &
 * zero_mask) == zero_mask.
 */
struct pattern {
	uint64_t factor, zero_mask;
};
#define PATTERN ((struct pattern){ .factor = 0x9e3779b97f4a7c15ul, .zero_mask = 0 })
uint64_t pattern_word(const struct pattern *pattern, uint64_t page, unsigned word);
void pattern_fill(const struct pattern *pattern, uint64_t page, void *to);
/*
 * Fails the case at the first word of the 4 KiB pages [first, first + count) that isn't the
 * pattern's.
 */
void pattern_check(const struct pattern *pattern, const void *memory, uint64_t first, uint64_t count);

/*
 * A resolver that installs the pattern, and counts its calls. It is the `opaque` of
 * kvmfault_vm_options.
 */
struct source {
	struct pattern pattern;
	uint64_t gpa; /* of page 0 */
	uint64_t pages;
	bool window;                              /* install all of the readahead window */
	_Atomic uint32_t *calls;                  /* of each page, counted by the faulting page */
	atomic_ulong total, vcpu, host, prefetch; /* calls; by origin */
};
void source_create(struct source *source, uint64_t gpa, uint64_t len, struct pattern pattern);
void source_destroy(struct source *source);
int source_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault);
/*
 * How many VMs are being freed: a resolver call that is under way may find its VM gone, and that is
 * no failure.
 */
extern atomic_uint vms_going;
/*
 * Installs the range, without counting: for resolvers of a test's own. Returns what
 * kvmfault_pages_install does, but 0 for a VM that machine_destroy is about to free.
 */
int source_install(const struct source *source, struct kvmfault_vm *vm, uint64_t gpa, uint64_t len);

/*
 * A resolver that answers KVMFAULT_PENDING for some pages: another thread installs them after a
 * while. `opaque` is the struct. Start and stop it around the vCPUs' run.
 */
struct later {
	struct source *source;
	unsigned every;   /* one page in `every` is left to the thread */
	unsigned most_us; /* the longest time that the thread waits before each page */
	struct kvmfault_vm *vm;
	pthread_t thread;
	pthread_mutex_t lock;
	pthread_cond_t news;
	uint64_t queue[4096];
	unsigned head, tail;
	bool stop;
};
void later_create(struct later *later, struct source *source, unsigned every, unsigned most_us);
void later_stop(struct later *later);
int later_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault);

#endif
