/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Test programs: one file, one program, one group of named cases.
 *
 *   PROGRAM --list the names of the cases PROGRAM CASE runs one: exits 0 (passed), 77 (skipped,
 *   "SKIP: reason" on stdout) or else (failed, "FAIL: reason");
 *                     "NOTE: figures" is what it measured
 *   PROGRAM           runs all, each in a process of its own
 *
 * A program is its file, the parts of its folder and those of harness/, built against an installed
 * library (pkg-config kvmfault) and nothing else but libc and pthread. runner.c is no part: it is
 * kvmfault-runner, which runs programs without the library.
 *
 * KVMFAULT_TEST_SCALE in the environment, a number like 0.1, shortens what is repeated very often,
 * for slow (emulated) machines.
 */
#ifndef HARNESS_H
#define HARNESS_H

#include <kvmfault.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct test_case {
	const char *name;
	void (*run)(void);
	/*
	 * Run with each mechanism, as name[memslot-flag] and so on; skipped, with the library's
	 * reason, where one doesn't work.
	 */
	bool each_mechanism;
};

/* A program's main. */
int harness_main(int argc, char **argv, const struct test_case *cases, size_t count);
#define TEST_MAIN(cases)                                                                \
	int main(int argc, char **argv)                                                 \
	{                                                                               \
		return harness_main(argc, argv, cases, sizeof(cases) / sizeof(*cases)); \
	}

/*
 * The mechanism that the case is to use (KVMFAULT_MECHANISM_*); AUTO for a case that isn't run with
 * each.
 */
int test_mechanism(void);
const char *mechanism_name(int mechanism);

/* End the case; from any thread. */
void fail(const char *file, int line, const char *format, ...) __attribute__((format(printf, 3, 4), noreturn));
void skip(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
/*
 * What the case measured or counted: shown with its result if it passes. Only the last note is
 * kept.
 */
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define FAIL(...) fail(__FILE__, __LINE__, __VA_ARGS__)
#define CHECK(condition, ...)              \
	do {                               \
		if (!(condition))          \
			FAIL(__VA_ARGS__); \
	} while (0)
/* Two integers are equal. */
#define EQUAL(what, got, expected)                                                                                     \
	do {                                                                                                           \
		long long got_ = (long long)(got), expected_ = (long long)(expected);                                  \
		if (got_ != expected_)                                                                                 \
			FAIL("%s: is %lld (%#llx), not %lld (%#llx)", what, got_, (unsigned long long)got_, expected_, \
			     (unsigned long long)expected_);                                                           \
	} while (0)
/* Waits until other threads have made the condition true; fails the case after 10 seconds. */
#define UNTIL(condition)                                                      \
	do {                                                                  \
		for (double end_ = now() + 10; !(condition); wait_a_little()) \
			CHECK(now() < end_, "not within 10 s: " #condition);  \
	} while (0)
/*
 * A call to the library succeeds (the value is its result, 0 or more); else the case ends with the
 * library's message.
 */
#define OK(call) expect_ok(__FILE__, __LINE__, #call, (call))
/*
 * A call to the library fails with -errno, and its message has `words` in it (an argument's name,
 * for example).
 */
#define REFUSED(call, error, words) expect_refused(__FILE__, __LINE__, #call, (call), error, words)
/* A system call succeeds. */
#define SYS(call) expect_sys(__FILE__, __LINE__, #call, (call))

long long expect_ok(const char *file, int line, const char *call, long long result);
void expect_refused(const char *file, int line, const char *call, long long result, int error, const char *words);
long expect_sys(const char *file, int line, const char *call, long result);

/*
 * `cleanup` is called when the case ends in any way but a crash or a kill. There is one at a time.
 */
void test_cleanup(void (*cleanup)(void));

/* `n` times KVMFAULT_TEST_SCALE; at least 1. */
unsigned long scaled(unsigned long n);
/* scaled(n), but not below `least`. */
#define SCALED(n, least) (scaled(n) > (least) ? scaled(n) : (unsigned long)(least))

double now(void); /* seconds, monotonic */
void wait_a_little(void);
uint64_t random_number(uint64_t *state); /* *state is any number but 0 */

#endif
