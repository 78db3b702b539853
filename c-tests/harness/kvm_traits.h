/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What this machine's KVM does where KVMs differ: how it runs a guest's CPL 0, and whether a vCPU
 * that sleeps for a page can be interrupted.
 */
#ifndef KVM_TRAITS_H
#define KVM_TRAITS_H

#include <stdbool.h>

/* Whether KVM emulates CPL 0 on this machine, as far as the mechanism poison-trap shows it. */
bool cpl0_is_emulated(void);
/*
 * Skips the case where a vCPU that sleeps for a page can't be interrupted: in userfaultfd before
 * Linux 6.2.
 */
void require_interruptible_sleep(void);
/*
 * Skips the case where a vCPU that sleeps in a slot without the fast path can't be interrupted,
 * with any mechanism.
 */
void require_interruptible_sleep_in_slow_slots(void);

/* Whether accesses at CPL 0 to absent pages come as MMIO exits, with the case's mechanism. */
bool cpl0_comes_as_mmio(void);

#endif
