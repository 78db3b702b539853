/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "harness.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SKIPPED = 77 };

static const struct {
	int number;
	const char *name;
} mechanisms[] = {
	{ KVMFAULT_MECHANISM_MEMSLOT_FLAG, "memslot-flag" },
	{ KVMFAULT_MECHANISM_POISON_TRAP, "poison-trap" },
	{ KVMFAULT_MECHANISM_USERFAULTFD, "userfaultfd" },
};
enum { MECHANISMS = sizeof(mechanisms) / sizeof(*mechanisms) };

static int mechanism = KVMFAULT_MECHANISM_AUTO;
static void (*cleanup)(void);

void test_cleanup(void (*f)(void))
{
	cleanup = f;
}

int test_mechanism(void)
{
	return mechanism;
}

const char *mechanism_name(int number)
{
	for (int i = 0; i < MECHANISMS; i++)
		if (mechanisms[i].number == number)
			return mechanisms[i].name;
	return "auto";
}

/* The last words of a case; other threads are ended with it. */
static void finish(int status, const char *verdict, const char *where, const char *format, va_list args)
{
	char text[2048];
	int length = snprintf(text, sizeof(text), "%s: %s", verdict, where);
	vsnprintf(text + length, sizeof(text) - length - 1, format, args);
	for (char *c = text; *c; c++)
		if (*c == '\n')
			*c = ' ';
	strcat(text, "\n");
	fflush(stderr);
	fflush(stdout);
	if (cleanup)
		cleanup();
	if (write(1, text, strlen(text)) < 0)
		_exit(1);
	_exit(status);
}

void fail(const char *file, int line, const char *format, ...)
{
	char where[256];
	va_list args;
	const char *name = strrchr(file, '/');
	snprintf(where, sizeof(where), "%s:%d: ", name ? name + 1 : file, line);
	va_start(args, format);
	finish(1, "FAIL", where, format, args);
	va_end(args);
	_exit(1);
}

void skip(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	finish(SKIPPED, "SKIP", "", format, args);
	va_end(args);
	_exit(1);
}

void note(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	fputs("NOTE: ", stdout);
	vprintf(format, args);
	putchar('\n');
	va_end(args);
}

long long expect_ok(const char *file, int line, const char *call, long long result)
{
	if (result < 0)
		fail(file, line, "%s: %s (%s)", call, strerror((int)-result), kvmfault_last_error());
	return result;
}

void expect_refused(const char *file, int line, const char *call, long long result, int error, const char *words)
{
	if (result != -error)
		fail(file, line, "%s: returned %lld (%s), not -%d (%s)", call, result,
		     result < 0 ? kvmfault_last_error() : "success", error, strerror(error));
	if (!strstr(kvmfault_last_error(), words))
		fail(file, line, "%s: the message doesn't say \"%s\": %s", call, words, kvmfault_last_error());
}

long expect_sys(const char *file, int line, const char *call, long result)
{
	if (result == -1)
		fail(file, line, "%s: %s", call, strerror(errno));
	return result;
}

unsigned long scaled(unsigned long n)
{
	const char *scale = getenv("KVMFAULT_TEST_SCALE");
	double scaled = scale ? n * strtod(scale, NULL) : n;
	return scaled < 1 ? 1 : scaled > n ? n : (unsigned long)scaled;
}

double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

void wait_a_little(void)
{
	usleep(500);
}

uint64_t random_number(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static int no_resolver(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm, (void)fault;
	return -EIO;
}

/*
 * Skips the case if its mechanism doesn't work here. Other tests notice a library that reports so
 * of one that works.
 */
static void require_mechanism(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		skip("/dev/kvm: %s", strerror(errno));
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		skip("KVM_CREATE_VM: %s", strerror(errno));
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vm *handle;
	options.kvm_fd = kvm;
	options.vm_fd = vm;
	options.mechanism = mechanism;
	options.resolver = no_resolver;
	int ret = kvmfault_vm_new(&options, &handle);
	if (ret == -EOPNOTSUPP || ret == -EPERM || ret == -EACCES)
		skip("%s", kvmfault_last_error());
	OK(ret);
	kvmfault_vm_free(handle);
	close(vm);
	close(kvm);
}

static void run_case(const struct test_case *c, int number)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	mechanism = number;
	if (c->each_mechanism)
		require_mechanism();
	c->run();
	fflush(stdout);
	if (cleanup)
		cleanup();
	/*
	 * Not exit: threads that a case has left behind (a resolver that never returns) may be
	 * anywhere.
	 */
	_exit(0);
}

static int run_apart(const struct test_case *c, int number)
{
	int status;
	fflush(stdout);
	pid_t child = fork();
	if (child == 0)
		run_case(c, number);
	if (child < 0 || waitpid(child, &status, 0) != child)
		return 1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

static void name_of(const struct test_case *c, int number, char *name, size_t size)
{
	if (c->each_mechanism)
		snprintf(name, size, "%s[%s]", c->name, mechanism_name(number));
	else
		snprintf(name, size, "%s", c->name);
}

int harness_main(int argc, char **argv, const struct test_case *cases, size_t count)
{
	bool list = argc == 2 && !strcmp(argv[1], "--list");
	const char *wanted = argc == 2 && !list ? argv[1] : NULL;
	unsigned passed = 0, failed = 0, skipped = 0;

	/* Sleepers don't look around by themselves: a wake-up that is lost is seen. */
	setenv("KVMFAULT_TEST_NO_LOOK_AROUND", "1", 0);

	if (argc > 2) {
		fprintf(stderr, "usage: %s [--list | CASE]\n", argv[0]);
		return 2;
	}
	for (const struct test_case *c = cases; c < cases + count; c++) {
		for (int i = 0; i < (c->each_mechanism ? MECHANISMS : 1); i++) {
			int number = c->each_mechanism ? mechanisms[i].number : KVMFAULT_MECHANISM_AUTO;
			char name[256];
			name_of(c, number, name, sizeof(name));
			if (list) {
				puts(name);
			} else if (wanted && !strcmp(wanted, name)) {
				run_case(c, number);
			} else if (!wanted) {
				double start = now();
				int status = run_apart(c, number);
				*(status == 0 ? &passed : status == SKIPPED ? &skipped : &failed) += 1;
				printf("%s %s %.2f\n",
				       status == 0         ? "PASS"
				       : status == SKIPPED ? "SKIP"
							   : "FAIL",
				       name, now() - start);
			}
		}
	}
	if (wanted) {
		fprintf(stderr, "%s: no case is called %s\n", argv[0], wanted);
		return 2;
	}
	if (!list)
		printf("%u passed, %u failed, %u skipped\n", passed, failed, skipped);
	return failed ? 1 : 0;
}
