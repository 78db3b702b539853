/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Lazy restore, the example to start from: a VM runs at once, and its memory comes from a snapshot
 * file page by page, as the guest touches it. The guest checks every page, and measures how long it
 * waits for each.
 *
 *   cc lazy-restore.c restore-options.c restore-table.c restore-conclusion.c snapshot.c \
 *      options.c output.c clock.c vcpu-threads.c tiny-vm.c guest.c guest.S \
 *      $(pkg-config --cflags --libs kvmfault) -pthread -o lazy-restore
 *
 * A VMM needs two things of libkvmfault: attach() in this file gives the guest's memory to the
 * library, and run_vcpu() in vcpu-threads.c runs a vCPU with it.
 */
#define _GNU_SOURCE
#include "clock.h"
#include "guest.h"
#include "output.h"
#include "restore-conclusion.h"
#include "restore-options.h"
#include "restore-table.h"
#include "snapshot.h"
#include "vcpu-threads.h"

#include <errno.h>
#include <kvmfault.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RAM_SLOT = 1, READAHEAD = 64, MOST_ROWS = 2 + 3 * MECHANISMS };

/* ---- the library ---- */

/*
 * Gives the guest's memory, which is empty, to the library: pages come from the snapshot as they
 * are touched.
 */
static struct kvmfault_vm *attach(const struct tiny_vm *vm, const struct row *row, int snapshot, void *ram,
				  uint64_t size)
{
	/*
	 * The library's own resolver, for a snapshot file. To get pages from elsewhere, write a
	 * function like it.
	 */
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	struct kvmfault_file_source *source;
	range.gpa = TINY_VM_RAM;
	range.len = size;
	if (kvmfault_file_source_new(snapshot, &range, 1, &source))
		die(0, "the snapshot: %s", kvmfault_last_error());

	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vm *memory;
	options.kvm_fd = vm->kvm;
	options.vm_fd = vm->vm;
	options.mechanism = row->mechanism->number; /* most programs use KVMFAULT_MECHANISM_AUTO */
	options.readahead = row->readahead;
	options.resolver = kvmfault_file_source_resolve;
	options.opaque = source;
	options.finalizer = kvmfault_file_source_finalize;
	if (kvmfault_vm_new(&options, &memory))
		die(0, "%s: %s", row->mechanism->name, kvmfault_last_error());

	/* Instead of KVM_SET_USER_MEMORY_REGION. */
	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	slot.slot = RAM_SLOT;
	slot.gpa = TINY_VM_RAM;
	slot.len = size;
	slot.hva = ram;
	if (kvmfault_memslot_set(memory, &slot))
		die(0, "%s: %s", row->mechanism->name, kvmfault_last_error());
	return memory;
}

/* Reads the library's counters when the guest has stopped. Returns whether no page is absent. */
static bool read_counters(struct kvmfault_vm *memory, bool all_touched, struct result *result)
{
	/*
	 * With userfaultfd the kernel wakes a vCPU before the library has recorded that the page
	 * is there.
	 */
	for (int i = 0; all_touched && i < 1000 && kvmfault_pages_absent(memory) > 0; i++)
		usleep(1000);
	struct kvmfault_stats stats = KVMFAULT_STATS_INIT;
	if (kvmfault_vm_stats(memory, &stats))
		die(0, "%s", kvmfault_last_error());
	result->faults = stats.faults_vcpu;
	result->resolver_calls = stats.resolver_calls;
	return kvmfault_pages_absent(memory) == 0;
}

/* ---- a row ---- */

/*
 * Shared memory suits all mechanisms, and the VMM may touch it at any time. It stays empty until
 * it is touched.
 */
static uint8_t *map_memory(uint64_t size)
{
	void *ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (ram == MAP_FAILED)
		die(errno, "%lu MiB of guest memory", (unsigned long)(size >> 20));
	return ram;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return (x > y) - (x < y);
}

static void run_row(const struct options *o, const struct row *row, int snapshot, const char *title,
		    struct result *result)
{
	uint64_t pages = o->size / PAGE_SIZE;
	bool zero = row->way == WAY_DEMAND_ZERO;
	struct kvmfault_vm *memory = NULL;
	struct vcpu_threads vcpus;

	*result = (struct result){ .row = *row, .vcpus = o->vcpus, .pages = pages };
	progress_show("%s", title);
	vcpu_threads_create(&vcpus, o->vcpus, pages, o->run);
	uint8_t *ram = map_memory(o->size);

	/* The restore begins. Creating the vCPUs is the same in all rows, and is not counted. */
	double began = seconds_now(), cpu_began = cpu_seconds_now();
	if (row->way == WAY_LAZY)
		memory = attach(&vcpus.vm, row, snapshot, ram, o->size);
	else
		tiny_vm_set_memory(&vcpus.vm, RAM_SLOT, TINY_VM_RAM, ram, o->size);
	if (row->way == WAY_READ_FIRST)
		snapshot_read(snapshot, ram, o->size);
	double prepared = seconds_now() - began;
	vcpu_threads_prepare(&vcpus, row->cpl, memory, zero);
	began = seconds_now() - prepared;
	vcpu_threads_start(&vcpus);
	while (progress_is_shown() && vcpus.running > 0) {
		progress_show("%s: %3d %%", title, (int)(vcpu_threads_touched(&vcpus) * 100 / pages));
		usleep(50000);
	}
	result->verified = vcpu_threads_join(&vcpus);
	result->first_work = vcpus.first_work - began;
	result->seconds = vcpus.finished - began;
	result->cpu_seconds = cpu_seconds_now() - cpu_began;
	progress_clear();

	qsort(vcpus.ticks, pages, sizeof(*vcpus.ticks), compare);
	result->p50_us = vcpus.ticks[(pages - 1) / 2] / ticks_per_microsecond();
	result->p99_us = vcpus.ticks[(pages - 1) * 99 / 100] / ticks_per_microsecond();
	if (memory)
		result->verified &= read_counters(memory, result->verified, result);
	/* Where a page is still absent, this fetches it. */
	result->verified &= guest_memory_is_right(ram, pages, zero);
	kvmfault_vm_free(memory);
	vcpu_threads_destroy(&vcpus);
	munmap(ram, o->size);
}

/* ---- all rows ---- */

/* Lists the rows: all of them at one privilege level, then each mechanism once at CPL 0. */
static size_t plan_rows(const struct options *o, const struct kvmfault_probe *probe, struct row *rows)
{
	bool all = !strcmp(o->mechanism, "all");
	int cpl = o->cpl == 0 ? 0 : 3;
	unsigned readahead = o->readahead ? o->readahead : 1;
	size_t count = 0;

	if (all) {
		rows[count++] = (struct row){ .way = WAY_DEMAND_ZERO, .cpl = cpl };
		rows[count++] = (struct row){ .way = WAY_READ_FIRST, .cpl = cpl };
	}
	for (int second = 0; second <= (o->cpl == -1); second++) {
		for (int m = 0; m < MECHANISMS; m++) {
			struct row row = { WAY_LAZY, &mechanisms[m], readahead, second ? 0 : cpl };
			if (!mechanism_is_wanted(row.mechanism, o->mechanism, probe))
				continue;
			rows[count++] = row;
			row.readahead = READAHEAD;
			if (all && !o->readahead && !second)
				rows[count++] = row;
		}
	}
	return count;
}

int main(int argc, char **argv)
{
	struct options o;
	parse_options(argc, argv, &o);

	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	if (kvmfault_probe(-1, &probe))
		die(0, "lazy-restore: %s", kvmfault_last_error());
	struct row rows[MOST_ROWS];
	struct result results[MOST_ROWS];
	size_t count = plan_rows(&o, &probe, rows);
	if (rows[count - 1].way != WAY_LAZY)
		die(0, "lazy-restore: no mechanism works here; target/examples/explain says why");

	progress_show("writing a snapshot");
	int snapshot = snapshot_write(o.size);
	if (o.wrong_byte >= 0)
		snapshot_damage(snapshot, o.wrong_byte);
	progress_clear();

	bool all_right = true;
	table_print_heading(&o);
	for (size_t i = 0; i < count; i++) {
		char title[80];
		snprintf(title, sizeof(title), "%zu of %zu: %s", i + 1, count, row_name(&rows[i]));
		run_row(&o, &rows[i], snapshot, title, &results[i]);
		table_print_result(&results[i]);
		all_right &= results[i].verified;
	}
	for (int m = 0; m < MECHANISMS && !strcmp(o.mechanism, "all"); m++)
		if (!mechanism_is_wanted(&mechanisms[m], o.mechanism, &probe))
			table_print_reason(&mechanisms[m]);
	conclusion_print(results, count);
	if (!all_right)
		fprintf(stderr, "lazy-restore: A PAGE WAS WRONG\n");
	if (o.json)
		write_json_list(o.json, results, count, table_write_result);
	return all_right ? 0 : 1;
}
