/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The library's system calls, as docs/seccomp.md lists them (tests/seccomp.rs compares): the name,
 * when it is made, and whether it is made in every run of seccomp.c. The others depend on the
 * mechanism, the kernel, the C library, or luck.
 */
#ifndef SECCOMP_CALLS_H
#define SECCOMP_CALLS_H

#define ANYTIME (SET_UP | RUNNING | ENDING)
/* clang-format off */
#define SECCOMP_CALLS(CALL)                              \
	CALL(ioctl, ANYTIME, ALWAYS)                     \
	CALL(read, SET_UP | RUNNING, ALWAYS)             \
	CALL(poll, SET_UP | RUNNING, ALWAYS)             \
	CALL(futex, ANYTIME, ALWAYS)                     \
	CALL(rt_sigtimedwait, RUNNING | ENDING, ALWAYS)  \
	CALL(rt_sigprocmask, ANYTIME, ALWAYS)            \
	CALL(rt_sigaction, ANYTIME, SOMETIMES)           \
	CALL(rt_sigreturn, ANYTIME, SOMETIMES)           \
	CALL(gettid, ANYTIME, ALWAYS)                    \
	CALL(getpid, ANYTIME, SOMETIMES)                 \
	CALL(tgkill, RUNNING | ENDING, ALWAYS)           \
	CALL(process_vm_readv, RUNNING, SOMETIMES)       \
	CALL(process_vm_writev, SET_UP | RUNNING, SOMETIMES) \
	CALL(madvise, ANYTIME, ALWAYS)                   \
	CALL(mmap, ANYTIME, ALWAYS)                      \
	CALL(munmap, ANYTIME, ALWAYS)                    \
	CALL(mprotect, ANYTIME, ALWAYS)                  \
	CALL(brk, ANYTIME, SOMETIMES)                    \
	CALL(mremap, ANYTIME, SOMETIMES)                 \
	CALL(munlock, ANYTIME, SOMETIMES)                \
	CALL(mincore, SET_UP | RUNNING, SOMETIMES)       \
	CALL(msync, SET_UP, SOMETIMES)                   \
	CALL(openat, SET_UP | RUNNING, ALWAYS)           \
	CALL(readlink, SET_UP | RUNNING, ALWAYS)         \
	CALL(close, ANYTIME, ALWAYS)                     \
	CALL(fcntl, SET_UP | RUNNING, ALWAYS)            \
	CALL(fstat, SET_UP | RUNNING, SOMETIMES)         \
	CALL(newfstatat, SET_UP | RUNNING, SOMETIMES)    \
	CALL(statx, SET_UP | RUNNING, SOMETIMES)         \
	CALL(fstatfs, SET_UP, ALWAYS)                    \
	CALL(statfs, SET_UP, SOMETIMES)                  \
	CALL(lseek, SET_UP | RUNNING, ALWAYS)            \
	CALL(pread64, SET_UP | RUNNING, ALWAYS)          \
	CALL(pwrite64, RUNNING, ALWAYS)                  \
	CALL(ftruncate, RUNNING, ALWAYS)                 \
	CALL(write, ANYTIME, SOMETIMES)                  \
	CALL(eventfd2, SET_UP, ALWAYS)                   \
	CALL(userfaultfd, SET_UP, SOMETIMES)             \
	CALL(clone, SET_UP | RUNNING, SOMETIMES)         \
	CALL(clone3, SET_UP | RUNNING, SOMETIMES)        \
	CALL(set_robust_list, SET_UP | RUNNING, ALWAYS)  \
	CALL(rseq, SET_UP | RUNNING, SOMETIMES)          \
	CALL(sigaltstack, ANYTIME, SOMETIMES)            \
	CALL(prctl, SET_UP | RUNNING, ALWAYS)            \
	CALL(exit, ANYTIME, ALWAYS)                      \
	CALL(sched_getaffinity, SET_UP | RUNNING, SOMETIMES) \
	CALL(sched_yield, ANYTIME, SOMETIMES)            \
	CALL(clock_nanosleep, ANYTIME, ALWAYS)           \
	CALL(clock_gettime, ANYTIME, SOMETIMES)          \
	CALL(setpriority, RUNNING, ALWAYS)               \
	CALL(restart_syscall, ANYTIME, SOMETIMES)        \
	CALL(uname, SET_UP, SOMETIMES)
/* clang-format on */

#endif
