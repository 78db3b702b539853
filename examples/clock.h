/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The host's clock, and the rate of the guest's clock by it.
 */
#ifndef CLOCK_H
#define CLOCK_H

/* Seconds since some point in the past, on a clock that is never set. */
double seconds_now(void);

/* Seconds of CPU time that this process has used, its guest included. */
double cpu_seconds_now(void);

/*
 * Ticks of the time stamp counter in a microsecond, measured on this machine at the first call.
 * The guest's counter has the same rate, unless a VMM sets another one (KVM_SET_TSC_KHZ); these
 * examples do not.
 */
double ticks_per_microsecond(void);

#endif
