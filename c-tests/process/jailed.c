/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VMM in a jail, which works with the descriptors that it has: /dev/kvm, VM, vCPU, userfaultfd
 * (or its device), memory, an open snapshot that only root may open, a working set. The guest's
 * memory is restored lazily from the snapshot, twice, the second time with a fill.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/landlock.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

enum { MEMORY = 8 << 20 };
#define USERFAULTFD_NEW _IO(0xAA, 0)

/* How a userfaultfd is had. */
enum { GIVEN, DEVICE, WAYS };

static struct inmate {
	struct machine m;
	struct ram ram;
	uint32_t *list;
	uint64_t list_gpa;
	int uffd;
} inmates[WAYS];

static struct kvmfault_file_source *source;
static struct pattern pattern = PATTERN;
static int snapshot, working_set_written, working_set;
static atomic_ulong calls, wrong_numbers;
static atomic_int strange_number;

/* ---- before ---- */

static int temporary(const char *what)
{
	char path[] = "/tmp/kvmfault-test-XXXXXX";
	int fd = mkostemp(path, O_CLOEXEC);
	CHECK(fd >= 0, "%s: %s", what, strerror(errno));
	SYS(fchmod(fd, 0600));
	return fd;
}

/* The snapshot, open for reading only, and unlinked. */
static int for_reading(int fd)
{
	char link[64], path[256] = "";
	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	SYS(readlink(link, path, sizeof(path) - 1));
	int again = SYS(open(path, O_RDONLY | O_CLOEXEC));
	unlink(path);
	return again;
}

/* A snapshot with data in one half, and a hole in the other. */
static void write_snapshot(void)
{
	uint8_t bytes[PAGE];
	int fd = temporary("a snapshot");
	pattern.zero_mask = 0x400;
	SYS(ftruncate(fd, MEMORY));
	for (uint64_t page = 0; page < MEMORY / PAGE; page++) {
		pattern_fill(&pattern, page, bytes);
		if (!(page & pattern.zero_mask))
			EQUAL("pwrite", pwrite(fd, bytes, PAGE, page * PAGE), PAGE);
	}
	snapshot = for_reading(fd);
	close(fd);
	working_set_written = temporary("a working set");
	working_set = for_reading(working_set_written);
}

static void prepare(enum backing backing)
{
	write_snapshot();
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	for (int way = 0; way < WAYS; way++) {
		struct inmate *i = &inmates[way];
		machine_create(&i->m, MEMORY / PAGE * sizeof(*i->list));
		ram_create(&i->ram, backing, MEMORY);
		i->list = machine_share(&i->m, MEMORY / PAGE * sizeof(*i->list), &i->list_gpa);
		list_shuffle(i->list, MEMORY / PAGE, 7 + way);
		machine_add_vcpu(&i->m, 3);
		if (way == DEVICE)
			i->uffd = device;
		else if (device >= 0)
			i->uffd = SYS(ioctl(device, USERFAULTFD_NEW, O_CLOEXEC | O_NONBLOCK));
		else
			i->uffd = SYS(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
	}
}

/* ---- inside ---- */

static int resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	calls++;
	/*
	 * The number comes from /proc, or from KVM's statistics; it is not known before Linux 5.14
	 * without /proc.
	 */
	if (fault->origin == KVMFAULT_ORIGIN_VCPU && fault->vcpu != 0) {
		strange_number = fault->vcpu;
		wrong_numbers++;
	}
	return kvmfault_file_source_resolve(opaque, vm, fault);
}

static bool has_statistics(void)
{
	struct utsname name;
	int major = 0, minor = 0;
	SYS(uname(&name));
	EQUAL("numbers in the kernel's release", sscanf(name.release, "%d.%d", &major, &minor), 2);
	return major > 5 || (major == 5 && minor >= 14);
}

static void restore(struct inmate *i, bool replay)
{
	struct kvmfault_memslot slot = slot_on(&i->ram, RAM_SLOT, RAM_GPA);
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_fill_options fill_options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_fill *fill;
	struct vcpu *v = i->m.vcpu[0];
	unsigned long before = calls;

	options.uffd = i->uffd;
	options.resolver = resolve;
	options.opaque = source;
	machine_attach(&i->m, NULL, &options);
	/* Once as a VMM that says nothing has it. */
	if (replay)
		slot.memory = KVMFAULT_MEMORY_AUTO;
	OK(kvmfault_memslot_set(i->m.library, &slot));
	vcpu_attach(v);
	if (replay) {
		fill_options.working_set_fd = working_set;
		OK(kvmfault_fill_start(i->m.library, &fill_options, &fill));
		OK(kvmfault_fill_wait_working_set(fill, 60000));
	} else {
		OK(kvmfault_working_set_record(i->m.library, 1));
	}
	vcpu_load_verify(v, RAM_GPA, i->list_gpa, MEMORY / PAGE / 2, &pattern, READ_FIRST);
	vcpu_verify(v);
	if (replay) {
		OK(kvmfault_fill_wait(fill, 60000));
		kvmfault_fill_free(fill);
	} else {
		OK(kvmfault_working_set_save(i->m.library, working_set_written));
	}
	OK(kvmfault_pages_resolve(i->m.library, RAM_GPA, i->ram.len));
	EQUAL("absent pages", kvmfault_pages_absent(i->m.library), 0);
	CHECK(calls > before, "nothing was installed");
	pattern_check(&pattern, i->ram.hva, 0, MEMORY / PAGE);
	vcpu_detach(v);
}

static bool maps_can_be_read(void)
{
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	if (fd >= 0)
		close(fd);
	return fd >= 0;
}

/* What isn't declared, and can't be found out, is refused with the reason. */
static void leave_undeclared(struct inmate *i)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_memslot slot = slot_on(&i->ram, RAM_SLOT, RAM_GPA);
	if (maps_can_be_read())
		return;
	options.uffd = i->uffd;
	options.resolver = resolve;
	machine_attach(&i->m, NULL, &options);
	slot.memory = KVMFAULT_MEMORY_AUTO;
	slot.fd = -1;
	/* Cut in two: a VMM has treated a part otherwise. */
	SYS(madvise(i->ram.hva, i->ram.len / 2, MADV_DONTDUMP));
	REFUSED(kvmfault_memslot_set(i->m.library, &slot), EINVAL, "/proc/self/maps can't be read");
	REFUSED(kvmfault_memslot_set(i->m.library, &slot), EINVAL,
		i->ram.backing == HUGETLB ? "slot.fd" : "slot.memory");
	SYS(madvise(i->ram.hva, i->ram.len / 2, MADV_DODUMP));
	kvmfault_vm_free(i->m.library);
}

static const char *explain(void)
{
	static char text[16384];
	int len = (int)OK(kvmfault_explain(inmates[0].m.kvm, text, sizeof(text)));
	CHECK(len < (int)sizeof(text), "the explanation has %d bytes", len);
	return text;
}

static void expect_in(const char *text, const char *words, bool there)
{
	CHECK(!strstr(text, words) == !there, "\"%s\" %s in: %s", words, there ? "isn't" : "is", text);
}

static void do_time(void)
{
	struct kvmfault_file_range range = KVMFAULT_FILE_RANGE_INIT;
	range.gpa = RAM_GPA;
	range.len = MEMORY;
	OK(kvmfault_file_source_new(snapshot, &range, 1, &source));
	EQUAL("the snapshot's file position", lseek(snapshot, 0, SEEK_CUR), 0);
	int done = 0;
	for (int way = 0; way < WAYS; way++) {
		if (way == DEVICE && inmates[way].uffd < 0) /* before Linux 6.1 */
			continue;
		/* A descriptor that is given serves one VM, the device as many as there are. */
		if (way == DEVICE)
			leave_undeclared(&inmates[way]);
		restore(&inmates[way], way != GIVEN);
		done++;
	}
	note("%d ways to have a userfaultfd", done);
	if (has_statistics())
		EQUAL("calls for a vCPU of another number", wrong_numbers ? strange_number : 0, 0);
	kvmfault_file_source_free(source);
}

static void release(void)
{
	for (int way = 0; way < WAYS; way++) {
		machine_destroy(&inmates[way].m);
		ram_destroy(&inmates[way].ram);
	}
}

/* ---- the jails ---- */

static void require_root(void)
{
	if (geteuid() != 0)
		skip("needs root, to give it up");
}

/* An empty directory; Firecracker's jailer does that. */
static void enter_chroot(void)
{
	char path[] = "/tmp/kvmfault-test-XXXXXX";
	require_root();
	CHECK(mkdtemp(path), "mkdtemp: %s", strerror(errno));
	SYS(chdir(path));
	SYS(rmdir(path));
	if (chroot("."))
		skip("chroot: %s", strerror(errno));
}

/* No path at all may be opened. */
static void enter_landlock(void)
{
	struct landlock_ruleset_attr attributes = {
		.handled_access_fs = LANDLOCK_ACCESS_FS_EXECUTE | LANDLOCK_ACCESS_FS_WRITE_FILE |
				     LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR,
	};
	long rules = syscall(SYS_landlock_create_ruleset, &attributes, sizeof(attributes), 0);
	if (rules < 0)
		skip("Landlock: %s", strerror(errno));
	SYS(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	SYS(syscall(SYS_landlock_restrict_self, (int)rules, 0));
	close((int)rules);
}

static void become_another_user(void)
{
	require_root();
	SYS(setresgid(65534, 65534, 65534));
	SYS(setresuid(65534, 65534, 65534));
}

/* All capabilities, none of which counts outside. */
static void enter_user_namespace(void)
{
	become_another_user();
	SYS(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
	if (unshare(CLONE_NEWUSER))
		skip("a user namespace: %s", strerror(errno));
}

static void serve(enum backing backing, void (*enter)(void))
{
	prepare(backing);
	enter();
	do_time();
}

#define JAIL(name, enter, backing)     \
	static void name(void)         \
	{                              \
		serve(backing, enter); \
		release();             \
	}
JAIL(no_proc, enter_chroot, MEMFD)
JAIL(no_proc_anon, enter_chroot, ANON)
JAIL(no_proc_hugetlb, enter_chroot, HUGETLB)
JAIL(landlock, enter_landlock, MEMFD)
JAIL(landlock_anon, enter_landlock, ANON)
JAIL(landlock_hugetlb, enter_landlock, HUGETLB)
JAIL(other_user, become_another_user, MEMFD)
JAIL(other_user_hugetlb, become_another_user, HUGETLB)
JAIL(user_namespace, enter_user_namespace, MEMFD)

/* ---- what kvmfault_explain says ---- */

static void explained(void)
{
	prepare(MEMFD);
	expect_in(explain(), "/proc/self/maps can be read", true);
	enter_landlock();
	expect_in(explain(), "/proc/self/maps can't be read", true);
	expect_in(explain(), "kvmfault_memslot.memory", true);
	release();
}

static void explained_in_a_user_namespace(void)
{
	prepare(MEMFD);
	enter_user_namespace();
	const char *text = explain();
	expect_in(text, "in a user namespace of its own", true);
	if (strstr(text, "can't be opened")) {
		expect_in(text, "CAP_SYS_PTRACE", false);
		expect_in(text, "/dev/userfaultfd", true);
		struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
		struct kvmfault_vm *vm;
		options.kvm_fd = inmates[0].m.kvm;
		options.vm_fd = inmates[0].m.vm;
		options.resolver = resolve;
		int ret = kvmfault_vm_new(&options, &vm);
		CHECK(ret == -EPERM || ret == -EACCES, "without a userfaultfd: %d", ret);
		expect_in(kvmfault_last_error(), "kvmfault_explain", true);
	}
	release();
}

static const struct test_case cases[] = {
	{ "no_proc", no_proc, true },
	{ "no_proc_anon", no_proc_anon, true },
	{ "no_proc_hugetlb", no_proc_hugetlb, true },
	{ "landlock", landlock, true },
	{ "landlock_anon", landlock_anon, true },
	{ "landlock_hugetlb", landlock_hugetlb, true },
	{ "other_user", other_user, true },
	{ "other_user_hugetlb", other_user_hugetlb, true },
	{ "user_namespace", user_namespace, true },
	{ "explained", explained, false },
	{ "explained_in_a_user_namespace", explained_in_a_user_namespace, false },
};
TEST_MAIN(cases)
