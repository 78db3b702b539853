/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Structures, arrays and addresses that are not what the header requires: the library reads nothing
 * beyond them, takes no half field for a whole one, and does not mistake its own memory for the
 * VMM's.
 */
#define _GNU_SOURCE
#include "intact_vm.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static struct intact_vm subject;
static struct kvmfault_file_source *source;
static struct kvmfault_fill *fill;

/* Two accessible pages and one that isn't: returns the end of what may be touched. */
static uint8_t *guarded_end(void)
{
	uint8_t *memory = map_anon(3 * PAGE);
	SYS(mprotect(memory + 2 * PAGE, PAGE, PROT_NONE));
	return memory + 2 * PAGE;
}

/* ---- sizes ---- */

static int snapshot(void)
{
	int fd = SYS(memfd_create("snapshot", MFD_CLOEXEC));
	SYS(ftruncate(fd, INTACT_VM_LEN));
	return fd;
}

/* Each call takes the structure, with nothing in it but its size. */
static int vm_new(void *p)
{
	struct kvmfault_vm *vm;
	return kvmfault_vm_new(p, &vm);
}

static int memslot_set(void *p)
{
	return kvmfault_memslot_set(subject.machine.library, p);
}

static int memslot_prepare(void *p)
{
	struct kvmfault_memslot slot = slot_on(&subject.ram, RAM_SLOT, INTACT_VM_GPA);
	slot.reserved = 1; /* goes wrong after the sizes were looked at */
	return kvmfault_memslot_prepare(subject.machine.library, &slot, p);
}

static int vcpu_new(void *p)
{
	struct kvmfault_vcpu *vcpu;
	return kvmfault_vcpu_new(subject.machine.library, p, &vcpu);
}

static int memory_error(void *p)
{
	return kvmfault_vcpu_memory_error(subject.vcpu->handle, p);
}

static int probe(void *p)
{
	return kvmfault_probe(-2, p); /* no descriptor: a probe takes time */
}

static int vm_stats(void *p)
{
	return kvmfault_vm_stats(subject.machine.library, p);
}

static int vcpu_stats(void *p)
{
	return kvmfault_vcpu_stats(subject.vcpu->handle, p);
}

static int source_new(void *p)
{
	struct kvmfault_file_source *unused;
	return kvmfault_file_source_new(-1, p, 1, &unused);
}

static int resolve_by_hand(void *p)
{
	return kvmfault_file_source_resolve(source, subject.machine.library, p);
}

static int fill_start(void *p)
{
	struct kvmfault_fill *unused;
	int ret = kvmfault_fill_start(subject.machine.library, p, &unused);
	CHECK(ret == 0 || !unused, "a handle after an error");
	kvmfault_fill_free(unused);
	return ret;
}

static int fill_status(void *p)
{
	return kvmfault_fill_status(fill, p);
}

#define F(type, field)                                                                                         \
	{                                                                                                      \
		offsetof(struct type, field), offsetof(struct type, field) + sizeof(((struct type *)0)->field) \
	}
struct field {
	size_t start, end;
};
static const struct structure {
	const char *name;
	int (*call)(void *);
	size_t size;
	struct field fields[32];
} structures[] = {
	{ "kvmfault_vm_options",
	  vm_new,
	  sizeof(struct kvmfault_vm_options),
	  { F(kvmfault_vm_options, kvm_fd), F(kvmfault_vm_options, vm_fd), F(kvmfault_vm_options, mechanism),
	    F(kvmfault_vm_options, uffd), F(kvmfault_vm_options, abi), F(kvmfault_vm_options, resolver),
	    F(kvmfault_vm_options, opaque), F(kvmfault_vm_options, finalizer), F(kvmfault_vm_options, written),
	    F(kvmfault_vm_options, reader_threads), F(kvmfault_vm_options, readahead),
	    F(kvmfault_vm_options, flags) } },
	{ "kvmfault_memslot",
	  memslot_set,
	  sizeof(struct kvmfault_memslot),
	  { F(kvmfault_memslot, slot), F(kvmfault_memslot, kvm_flags), F(kvmfault_memslot, gpa),
	    F(kvmfault_memslot, len), F(kvmfault_memslot, hva), F(kvmfault_memslot, block_hva),
	    F(kvmfault_memslot, block_len), F(kvmfault_memslot, memory), F(kvmfault_memslot, fd),
	    F(kvmfault_memslot, fd_offset), F(kvmfault_memslot, flags), F(kvmfault_memslot, reserved) } },
	{ "kvmfault_region",
	  memslot_prepare,
	  sizeof(struct kvmfault_region),
	  { F(kvmfault_region, ioctl_version), F(kvmfault_region, slot), F(kvmfault_region, flags),
	    F(kvmfault_region, reserved), F(kvmfault_region, guest_phys_addr), F(kvmfault_region, memory_size),
	    F(kvmfault_region, userspace_addr), F(kvmfault_region, userfault_bitmap) } },
	{ "kvmfault_vcpu_options",
	  vcpu_new,
	  sizeof(struct kvmfault_vcpu_options),
	  { F(kvmfault_vcpu_options, fd), F(kvmfault_vcpu_options, sigbus), F(kvmfault_vcpu_options, run),
	    F(kvmfault_vcpu_options, kick_signal), F(kvmfault_vcpu_options, flags) } },
	{ "kvmfault_memory_error_info",
	  memory_error,
	  sizeof(struct kvmfault_memory_error_info),
	  { F(kvmfault_memory_error_info, gpa), F(kvmfault_memory_error_info, hva), F(kvmfault_memory_error_info, len),
	    F(kvmfault_memory_error_info, lost), F(kvmfault_memory_error_info, reserved) } },
	{ "kvmfault_probe",
	  probe,
	  sizeof(struct kvmfault_probe),
	  { F(kvmfault_probe, mechanisms_anon), F(kvmfault_probe, mechanisms_shared),
	    F(kvmfault_probe, mechanisms_hugetlb), F(kvmfault_probe, reserved), F(kvmfault_probe, uffd_features),
	    F(kvmfault_probe, abi), F(kvmfault_probe, pre_fault_memory), F(kvmfault_probe, two_dimensional_paging) } },
#define STATS                                                                                                       \
	{                                                                                                           \
		F(kvmfault_stats, faults_vcpu), F(kvmfault_stats, faults_host), F(kvmfault_stats, faults_prefetch), \
			F(kvmfault_stats, resolver_calls), F(kvmfault_stats, outcome_resolved),                     \
			F(kvmfault_stats, outcome_waited), F(kvmfault_stats, outcome_mapped),                       \
			F(kvmfault_stats, outcome_lost), F(kvmfault_stats, outcome_failed),                         \
			F(kvmfault_stats, outcome_interrupted), F(kvmfault_stats, outcome_retried),                 \
			F(kvmfault_stats, pages_copied), F(kvmfault_stats, pages_zeroed),                           \
			F(kvmfault_stats, pages_mapped), F(kvmfault_stats, pages_discarded),                        \
			F(kvmfault_stats, retries_again), F(kvmfault_stats, retries_exist),                         \
			F(kvmfault_stats, mmio_reads), F(kvmfault_stats, mmio_writes), F(kvmfault_stats, kicks),    \
			F(kvmfault_stats, latency_us_log2), F(kvmfault_stats, ahead_asked),                         \
			F(kvmfault_stats, ahead_failed), F(kvmfault_stats, pages_empty),                            \
			F(kvmfault_stats, pages_given_back)                                                         \
	}
	{ "kvmfault_stats", vm_stats, sizeof(struct kvmfault_stats), STATS },
	{ "kvmfault_stats", vcpu_stats, sizeof(struct kvmfault_stats), STATS },
	{ "kvmfault_file_range",
	  source_new,
	  sizeof(struct kvmfault_file_range),
	  { F(kvmfault_file_range, gpa), F(kvmfault_file_range, len), F(kvmfault_file_range, offset) } },
	{ "kvmfault_fault",
	  resolve_by_hand,
	  sizeof(struct kvmfault_fault),
	  { F(kvmfault_fault, gpa), F(kvmfault_fault, len), F(kvmfault_fault, hva), F(kvmfault_fault, slot),
	    F(kvmfault_fault, access), F(kvmfault_fault, origin), F(kvmfault_fault, vcpu),
	    F(kvmfault_fault, window_gpa), F(kvmfault_fault, window_len) } },
	{ "kvmfault_fill_options",
	  fill_start,
	  sizeof(struct kvmfault_fill_options),
	  { F(kvmfault_fill_options, threads), F(kvmfault_fill_options, batch),
	    F(kvmfault_fill_options, bytes_per_second), F(kvmfault_fill_options, progress),
	    F(kvmfault_fill_options, opaque), F(kvmfault_fill_options, finalizer),
	    F(kvmfault_fill_options, interval_ms), F(kvmfault_fill_options, flags),
	    F(kvmfault_fill_options, working_set_fd), F(kvmfault_fill_options, reserved), F(kvmfault_fill_options, gpa),
	    F(kvmfault_fill_options, len) } },
	{ "kvmfault_fill_progress",
	  fill_status,
	  sizeof(struct kvmfault_fill_progress),
	  { F(kvmfault_fill_progress, pages_total), F(kvmfault_fill_progress, pages_left),
	    F(kvmfault_fill_progress, failures), F(kvmfault_fill_progress, bytes_per_second),
	    F(kvmfault_fill_progress, eta_ms), F(kvmfault_fill_progress, working_set_done),
	    F(kvmfault_fill_progress, ended), F(kvmfault_fill_progress, paused),
	    F(kvmfault_fill_progress, threads_calling) } },
};

/*
 * Every structure with every size up to 8 bytes more than it has, at the end of what may be
 * touched. A size that ends in the middle of a field is refused, and no other.
 */
static void every_size(void)
{
	uint8_t *end = guarded_end();
	struct kvmfault_fill_options options = KVMFAULT_FILL_OPTIONS_INIT;
	struct kvmfault_file_range all = KVMFAULT_FILE_RANGE_INIT;
	intact_vm_create(&subject);
	all.gpa = INTACT_VM_GPA;
	all.len = INTACT_VM_LEN;
	OK(kvmfault_file_source_new(snapshot(), &all, 1, &source));
	/* Over before it begins; its handle is what counts. */
	OK(kvmfault_fill_start(subject.machine.library, &options, &fill));
	kvmfault_fill_stop(fill);
	(void)kvmfault_fill_wait(fill, -1);
	for (size_t i = 0; i < sizeof(structures) / sizeof(*structures); i++) {
		const struct structure *s = &structures[i];
		for (size_t size = 0; size <= s->size + 8; size++) {
			bool whole = size > sizeof(size_t);
			for (const struct field *f = s->fields; f->end; f++)
				whole = whole && !(f->start < size && size < f->end);
			uint8_t *at = end - (size < sizeof(size_t) ? sizeof(size_t) : size);
			memset(at, 0, end - at);
			memcpy(at, &size, sizeof(size));
			int ret = s->call(at);
			const char *words = ret < 0 ? kvmfault_last_error() : "";
			bool refused = ret == -EINVAL && strstr(words, "size: is");
			CHECK(refused == !whole, "%s with size %zu (it has %zu): returned %d, \"%s\"", s->name, size,
			      s->size, ret, words);
		}
	}
	kvmfault_fill_free(fill);
	kvmfault_file_source_free(source);
	intact_vm_destroy(&subject);
}

/* ---- arrays ---- */

static struct kvmfault_file_range *three_ranges(void)
{
	struct kvmfault_file_range *ranges = (void *)(guarded_end() - 3 * sizeof(*ranges));
	for (int i = 0; i < 3; i++) {
		ranges[i] = (struct kvmfault_file_range)KVMFAULT_FILE_RANGE_INIT;
		ranges[i].gpa = ranges[i].offset = i * PAGE;
		ranges[i].len = PAGE;
	}
	return ranges;
}

/* Of an array that ends where memory ends nothing more is read, whatever its elements say. */
static void array_ends(void)
{
	struct kvmfault_file_range *ranges = three_ranges();
	int fd = snapshot();
	OK(kvmfault_file_source_new(fd, ranges, 3, &source));
	kvmfault_file_source_free(source);
	for (int i = 1; i < 3; i++) {
		for (const size_t *bad = (const size_t[]){ 1, 8, 24, 40, 4096, 4097, SIZE_MAX, 0 }; *bad; bad++) {
			ranges[i].size = *bad;
			REFUSED(kvmfault_file_source_new(fd, ranges, 3, &source), EINVAL,
				i == 1 ? "ranges[1].size" : "ranges[2].size");
		}
		ranges[i].size = sizeof(*ranges);
	}
}

static atomic_bool stop;

static void *change_size(void *arg)
{
	volatile size_t *size = arg;
	while (!stop)
		*size = *size == 4096 ? sizeof(struct kvmfault_file_range) : 4096;
	return NULL;
}

/* A size that another thread changes meanwhile is read once. */
static void size_changes(void)
{
	struct kvmfault_file_range *ranges = three_ranges();
	pthread_t thread;
	int fd = snapshot();
	unsigned long good = 0, tries = 0;
	CHECK(!pthread_create(&thread, NULL, change_size, &ranges[2].size), "pthread_create");
	for (double end = now() + 10; now() < end && (tries < scaled(20000) || good < 100 || good == tries); tries++) {
		int ret = kvmfault_file_source_new(fd, ranges, 3, &source);
		CHECK(ret == 0 || ret == -EINVAL, "returned %d: %s", ret, kvmfault_last_error());
		good += ret == 0;
		kvmfault_file_source_free(source);
	}
	stop = true;
	pthread_join(thread, NULL);
	note("%lu tries, %lu of them with the right size", tries, good);
}

/* ---- faults of the VMM's own making ---- */

static int answer(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	return kvmfault_file_source_resolve(opaque, vm, fault);
}

static void faults(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_file_range all = KVMFAULT_FILE_RANGE_INIT;
	all.gpa = INTACT_VM_GPA;
	all.len = INTACT_VM_LEN;
	OK(kvmfault_file_source_new(snapshot(), &all, 1, &source));
	options.resolver = answer;
	options.opaque = source;
	options.finalizer = kvmfault_file_source_finalize;
	intact_vm_create_with(&subject, &options);
	struct kvmfault_vm *vm = subject.machine.library;
	const uint64_t gpa = INTACT_VM_GPA + 16 * PAGE;
	const struct kvmfault_fault good = {
		.size = sizeof(good),
		.gpa = gpa,
		.len = PAGE,
		.vcpu = -1,
		.window_gpa = gpa - PAGE,
		.window_len = 4 * PAGE,
	};
	const struct {
		uint64_t gpa, len, window_gpa, window_len;
		const char *words;
	} bad[] = {
		{ gpa, 0, gpa, PAGE, "fault->len" },
		{ gpa, 512, gpa, PAGE, "fault->len" },
		{ gpa, 3 * PAGE, gpa, 3 * PAGE, "fault->len" },
		{ gpa, UINT64_MAX, gpa, PAGE, "fault->len" },
		{ gpa + 1, PAGE, gpa, PAGE, "fault->gpa" },
		{ -PAGE, PAGE, -PAGE, PAGE, "fault->gpa" },
		{ gpa, PAGE, gpa, 0, "fault->window" },
		{ gpa, PAGE, gpa, PAGE + 8, "fault->window" },
		{ gpa, PAGE, gpa + PAGE, PAGE, "fault->window" },
		{ gpa, PAGE, gpa - PAGE, PAGE, "fault->window" },
		{ gpa, PAGE, gpa - 8, 2 * PAGE, "fault->window" },
		{ gpa, PAGE, gpa, -gpa, "fault->window" },
		{ gpa, PAGE, PAGE, -PAGE, "fault->window" },
	};
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		struct kvmfault_fault fault = good;
		fault.gpa = bad[i].gpa;
		fault.len = bad[i].len;
		fault.window_gpa = bad[i].window_gpa;
		fault.window_len = bad[i].window_len;
		REFUSED(kvmfault_file_source_resolve(source, vm, &fault), EINVAL, bad[i].words);
	}
	REFUSED(kvmfault_file_source_resolve(source, vm, NULL), EINVAL, "fault");
	REFUSED(kvmfault_file_source_resolve(NULL, vm, &good), EINVAL, "source");
	REFUSED(kvmfault_file_source_resolve(vm, vm, &good), EBADF, "source");
	REFUSED(kvmfault_file_source_resolve(source, NULL, &good), EINVAL, "vm");
	for (int page = 15; page < 20; page++)
		EQUAL("the page", OK(kvmfault_pages_state(vm, INTACT_VM_GPA + page * PAGE)), KVMFAULT_PAGE_ABSENT);
	EQUAL("the good one", kvmfault_file_source_resolve(source, vm, &good), KVMFAULT_RESOLVED);
	for (int page = 15; page < 19; page++)
		EQUAL("the page", OK(kvmfault_pages_state(vm, INTACT_VM_GPA + page * PAGE)), KVMFAULT_PAGE_PRESENT);
	intact_vm_destroy(&subject);
}

/* ---- addresses ---- */

/* KVM's mapping of the memory is the library's own: the bytes there are not the VMM's source. */
static void addresses_of_the_alias(void)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_region region = KVMFAULT_REGION_INIT;
	struct machine m;
	struct ram ram;
	int uffd = new_uffd();
	options.flags = KVMFAULT_VM_EXTERNAL_UFFD;
	options.resolver = answer;
	options.mechanism = test_mechanism();
	machine_create(&m, PAGE);
	ram_create(&ram, MEMFD, 64 * PAGE);
	options.kvm_fd = m.kvm;
	options.vm_fd = m.vm;
	struct kvmfault_vm *vm;
	int ret = kvmfault_vm_new(&options, &vm);
	if (ret == -EOPNOTSUPP)
		skip("%s", kvmfault_last_error());
	OK(ret);
	struct kvmfault_memslot slot = slot_on(&ram, RAM_SLOT, RAM_GPA);
	OK(kvmfault_memslot_prepare(vm, &slot, &region));
	uint8_t *alias = (void *)(uintptr_t)region.userspace_addr;
	int64_t absent = OK(kvmfault_pages_absent(vm));
	if (alias == ram.hva) {
		kvmfault_vm_free(vm);
		skip("KVM has the VMM's own mapping");
	}
	for (int page = 0; page < 64; page++) {
		EQUAL("translated", (int64_t)(uintptr_t)kvmfault_vm_address(vm, alias + page * PAGE),
		      (int64_t)(uintptr_t)(ram.hva + page * PAGE));
		REFUSED(kvmfault_pages_arrived(vm, alias + page * PAGE, PAGE), ENOENT, "hva");
		REFUSED(kvmfault_pages_missing(vm, alias + page * PAGE, PAGE), ENOENT, "hva");
		EQUAL("absent pages", kvmfault_pages_absent(vm), absent);
	}
	kvmfault_vm_free(vm);
	close(uffd);
	machine_destroy(&m);
	ram_destroy(&ram);
}

static const struct test_case cases[] = {
	{ "every-size", every_size, false },
	{ "array-ends", array_ends, false },
	{ "size-changes", size_changes, false },
	{ "faults", faults, false },
	{ "addresses-of-the-alias", addresses_of_the_alias, true },
};
TEST_MAIN(cases)
