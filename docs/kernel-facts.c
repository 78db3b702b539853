// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Facts of docs/kernel.md that a program without KVM and without the library can show. Each prints
 * "as documented" or what the kernel did instead.
 *
 *     cc -o kernel-facts docs/kernel-facts.c && ./kernel-facts
 *
 * Exit status: 0, 1 if a fact is not as documented, 77 without a userfaultfd or UFFDIO_POISON.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef UFFDIO_POISON
struct uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif
#define FEATURE_POISON (1 << 14)
#define FEATURE_MINOR_SHMEM (1 << 10)
#define PAGE 4096ul
#define PAGES 8

static int uffd, wrong;
static char bytes[PAGES * PAGE] __attribute__((aligned(4096)));

static void fact(int holds, const char *name, const char *text)
{
	printf("%-16s %s: %s\n", name, text, holds ? "as documented" : "NOT as documented");
	wrong += !holds;
}

/* An ioctl that installs: the bytes done, or -errno. `out` is its output field. */
static long install(unsigned long request, void *arg, const __s64 *out)
{
	return ioctl(uffd, request, arg) == 0 ? *out : -errno;
}

static long copy(void *at, size_t len, long *out)
{
	struct uffdio_copy arg = { .dst = (uintptr_t)at, .src = (uintptr_t)bytes, .len = len };
	long ret = install(UFFDIO_COPY, &arg, &arg.copy);
	if (out)
		*out = arg.copy;
	return ret;
}

static long zero(void *at)
{
	struct uffdio_zeropage arg = { .range = { (uintptr_t)at, PAGE } };
	return install(UFFDIO_ZEROPAGE, &arg, &arg.zeropage);
}

static long map(void *at)
{
	struct uffdio_continue arg = { .range = { (uintptr_t)at, PAGE } };
	return install(UFFDIO_CONTINUE, &arg, &arg.mapped);
}

static long poison(void *at)
{
	struct uffdio_poison arg = { .range = { (uintptr_t)at, PAGE } };
	return install(UFFDIO_POISON, &arg, &arg.updated);
}

static void register_range(void *at, size_t len, int mode)
{
	struct uffdio_register arg = { .range = { (uintptr_t)at, len }, .mode = mode };
	if (ioctl(uffd, UFFDIO_REGISTER, &arg) < 0) {
		perror("UFFDIO_REGISTER");
		exit(77);
	}
}

/* Memory that is registered for missing pages. */
static char *memory(int flags, int fd)
{
	char *at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (at == MAP_FAILED) {
		perror("mmap");
		exit(77);
	}
	register_range(at, PAGES * PAGE, UFFDIO_REGISTER_MODE_MISSING);
	return at;
}

static sigjmp_buf out;
static siginfo_t seen;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	seen = *info;
	siglongjmp(out, 1);
}

/* Does a load of this address end in SIGBUS? */
static int breaks(const char *at)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	sigaction(SIGBUS, &action, NULL);
	if (sigsetjmp(out, 1))
		return 1;
	(void)*(volatile const char *)at;
	return 0;
}

static int has_a_page(const char *at)
{
	unsigned char resident;
	return mincore((void *)at, PAGE, &resident) == 0 && (resident & 1);
}

static void markers(void)
{
	char *private = memory(MAP_PRIVATE | MAP_ANONYMOUS, -1);
	int fd = memfd_create("facts", MFD_CLOEXEC);
	char *shared, *other, *alias;
	int ends[2];

	if (fd < 0 || ftruncate(fd, PAGES * PAGE) < 0 || pipe(ends) < 0)
		exit(77);
	shared = memory(MAP_SHARED, fd);
	other = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	alias = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	register_range(alias, PAGES * PAGE, UFFDIO_REGISTER_MODE_MISSING);

	fact(poison(private) == PAGE && poison(private) == -EEXIST, "marker-twice",
	     "UFFDIO_POISON over a marker is EEXIST");
	fact(zero(private) == -EEXIST, "zero-private",
	     "UFFDIO_ZEROPAGE over a marker in private memory is EEXIST");
	fact(write(ends[1], private, 1) == -1 && errno == EFAULT, "marker-syscall",
	     "a system call that reads a marker is EFAULT");
	fact(breaks(private) && seen.si_addr == private &&
		 (seen.si_code == BUS_MCEERR_AR || seen.si_code == BUS_ADRERR),
	     "marker-load", "a load of a marker is SIGBUS with its address");
	fact(copy(private, PAGE, NULL) == PAGE && *private == 'x', "copy-private",
	     "UFFDIO_COPY replaces a marker in private memory");
	fact(poison(private) == -EEXIST, "marker-page", "UFFDIO_POISON over a page is EEXIST");
	fact(madvise(private, PAGE, MADV_DONTNEED) == 0 && poison(private) == PAGE &&
		 madvise(private, PAGE, MADV_DONTNEED) == 0 && poison(private) == PAGE,
	     "dontneed", "MADV_DONTNEED clears a page or marker, which can be marked again");

	fact(poison(shared) == PAGE && zero(shared) == PAGE && *shared == 0, "zero-shared",
	     "UFFDIO_ZEROPAGE replaces a marker in shared memory");
	fact(poison(shared + PAGE) == PAGE && copy(shared + PAGE, PAGE, NULL) == PAGE &&
		 shared[PAGE] == 'x',
	     "copy-shared", "UFFDIO_COPY replaces a marker in shared memory");
	fact(poison(shared + 2 * PAGE) == PAGE &&
		 madvise(shared + 2 * PAGE, PAGE, MADV_REMOVE) == 0 && breaks(shared + 2 * PAGE),
	     "remove", "MADV_REMOVE leaves a marker of shared memory in place");
	fact(!breaks(other + 2 * PAGE) && other[2 * PAGE] == 0, "other-mapping",
	     "another mapping of the file doesn't have the marker");

	fact(poison(alias + 3 * PAGE) == PAGE && copy(shared + 3 * PAGE, PAGE, NULL) == PAGE &&
		 breaks(alias + 3 * PAGE) && map(alias + 3 * PAGE) == PAGE &&
		 alias[3 * PAGE] == 'x',
	     "continue", "UFFDIO_CONTINUE replaces a marker by the page of the page cache");
	fact(map(alias + 4 * PAGE) == -EFAULT, "continue-nothing",
	     "UFFDIO_CONTINUE without a page in the page cache is EFAULT");
}

static void installs(void)
{
	char *private = memory(MAP_PRIVATE | MAP_ANONYMOUS, -1), *unknown;
	struct uffdio_range wake = { 0, PAGE };
	long part = 0;
	char one;

	copy(private + 2 * PAGE, PAGE, NULL);
	fact(copy(private, 4 * PAGE, &part) == -EAGAIN && part == 2 * PAGE &&
		 has_a_page(private + PAGE) && !has_a_page(private + 3 * PAGE),
	     "partial", "UFFDIO_COPY that meets a page midway is EAGAIN with the bytes done");
	fact(copy(private + 2 * PAGE, PAGE, &part) == -EEXIST && part == -EEXIST, "exists",
	     "UFFDIO_COPY to a page is EEXIST, in the output field too");

	unknown = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	fact(copy(unknown, PAGE, NULL) == -ENOENT, "unregistered",
	     "UFFDIO_COPY outside of a registration is ENOENT");
	wake.start = (uintptr_t)unknown;
	fact(ioctl(uffd, UFFDIO_WAKE, &wake) == 0 && munmap(unknown, PAGE) == 0 &&
		 ioctl(uffd, UFFDIO_WAKE, &wake) == 0,
	     "wake-anywhere", "UFFDIO_WAKE works on unregistered and unmapped ranges");
	fact(read(uffd, &one, 1) == -1 && errno == EINVAL, "short-read",
	     "a read shorter than a message is EINVAL");

	pid_t child = fork();
	if (child == 0)
		_exit(copy(private + 5 * PAGE, PAGE, NULL) == PAGE &&
			      !has_a_page(private + 5 * PAGE)
			  ? 0
			  : 1);
	int status = -1;
	waitpid(child, &status, 0);
	fact(status == 0 && has_a_page(private + 5 * PAGE) && private[5 * PAGE] == 'x', "fork",
	     "UFFDIO_COPY in a forked child installs in the parent");
}

static void mappings(void)
{
	char *hole =
	    mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0),
	     *twin;
	const size_t endless = (1ul << 47) - 2 * PAGE; /* nearly all of the address space */
	int ends[2], directory = open("/", O_RDONLY | O_DIRECTORY);
	char none;

	fact(mremap(hole, 3 * PAGE, endless, 0) == MAP_FAILED && errno == ENOMEM, "mremap-whole",
	     "an endless mremap of one mapping is ENOMEM");
	mprotect(hole + PAGE, PAGE, PROT_READ);
	fact(mremap(hole, 3 * PAGE, endless, 0) == MAP_FAILED && errno == EFAULT, "mremap-several",
	     "an endless mremap of several mappings is EFAULT");
	munmap(hole + PAGE, PAGE);
	fact(msync(hole, 3 * PAGE, MS_ASYNC) == -1 && errno == ENOMEM, "msync",
	     "msync(MS_ASYNC) of a range with a hole is ENOMEM");
	*shared = 7;
	twin = mremap(shared, 0, PAGE, MREMAP_MAYMOVE);
	fact(twin != MAP_FAILED && *twin == 7 && *shared == 7, "mremap-twin",
	     "mremap with an old size of 0 duplicates a shared mapping");
	fact(mremap(hole, 0, PAGE, MREMAP_MAYMOVE) == MAP_FAILED && errno == EINVAL,
	     "mremap-private", "and is EINVAL for a private one");
	if (pipe(ends) == 0)
		fact(pread(ends[0], &none, 0, 0) == -1 && errno == ESPIPE, "pread-pipe",
		     "pread of 0 bytes of a pipe is ESPIPE");
	fact(pread(directory, &none, 0, 0) == -1 && errno == EISDIR, "pread-directory",
	     "pread of 0 bytes of a directory is EISDIR");
}

int main(void)
{
	struct uffdio_api api = { .api = UFFD_API,
				  .features = FEATURE_POISON | FEATURE_MINOR_SHMEM };

	setvbuf(stdout, NULL, _IOLBF, 0);
	memset(bytes, 'x', sizeof(bytes));
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0) {
		perror("no userfaultfd with UFFDIO_POISON");
		return 77;
	}
	markers();
	installs();
	mappings();
	return wrong != 0;
}
