/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VMM with a post-copy of its own, as QEMU has one (KVMFAULT_VM_EXTERNAL_UFFD): its userfaultfd
 * serves its threads, a stream delivers the pages, and the library serves the vCPUs instead of that
 * userfaultfd. There is one, `postcopy_vmm`.
 */
#ifndef POSTCOPY_VMM_H
#define POSTCOPY_VMM_H

#include "machine.h"

enum { PAGES = 2048, VCPUS = 4 };

/*
 * The VMM: half of its memory is there before the vCPUs run (pre-copy); a stream installs the rest,
 * requested or not.
 */
extern struct postcopy_vmm {
	struct machine m;
	struct ram ram;
	struct source source; /* the other side's memory */
	uint32_t *list;
	uint64_t list_gpa;
	int uffd, quit[2];
	pthread_t stream, reader;
	_Atomic uint8_t received[PAGES]; /* set after the page is in the VMM's mapping */
	_Atomic uint8_t requested[PAGES];
	atomic_uint calls, there_already, host_faults;
	atomic_bool paused, stop;
	atomic_uint *waits_for; /* while this is 0, the stream sends only requested pages */
	atomic_bool held;       /* the resolver neither returns nor looks at a page */
} postcopy_vmm;

/*
 * The VM and its memory, of which five eighths are missing; `stream` false: the stream is paused at
 * first.
 */
void postcopy_vmm_set_up(enum backing backing, bool stream);
void postcopy_vmm_tear_down(void);
/* A userfaultfd of the VMM's; skips the case if it can't be had. */
int postcopy_vmm_open_uffd(void);
/* What postcopy_vmm_set_up gives to kvmfault_vm_new, and a slot on all of the memory. */
struct kvmfault_vm_options postcopy_vmm_options(void);
struct kvmfault_memslot postcopy_vmm_slot(uint32_t number, uint64_t gpa);
/* A page has come: installs it in the VMM's mapping, and reports it to the library. */
void postcopy_vmm_place(uint64_t page);
/* Runs all vCPUs, at both privilege levels; each verifies its part of the list. */
void postcopy_vmm_run_guests(int mode);

#endif
