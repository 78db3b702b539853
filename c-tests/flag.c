/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The memslot flag: recognised by what it does and by nothing else; on from the start, and turned on and off under running vCPUs; beside
 * dirty logging and read-only slots; where pages are present but can't be used as they are; and where memory is broken for good. What isn't
 * peculiar to the flag runs with each mechanism.
 */
#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define CAP_PRE_FAULT_MEMORY 236 /* v7's EXIT_ON_MISSING, too */
#define EXIT_MEMORY_FAULT 39      /* newer than some headers */

/* ---- which ABI the kernel has ---- */

static const struct abi {
	const char *parameter, *name; /* the test kernel's (see kernel/), the library's */
	int run_errno;                /* KVM_RUN's, at a fault */
	uint32_t flag, ioctl_version;
	bool bitmap, readonly;        /* can it be had together with KVM_MEM_READONLY, so that the guest can read? */
} abis[] = {
	{ "v2", "v2", EPERM, 1 << 2, 1, false, false },
	{ "v3", "v3", EFAULT, 1 << 2, 1, false, false },
	{ "v4", "v4", EFAULT, 1 << 2, 1, false, false },
	{ "v7", "v7", EFAULT, 1 << 3, 1, false, false },
	{ "userfault", "userfault-v3", EFAULT, 1 << 3, 2, true, true },
};
enum { ABIS = sizeof(abis) / sizeof(*abis) };

/* What the test kernel was told to be, or "". */
static const char *fault_abi(void)
{
	static char text[64];
	FILE *file = fopen("/sys/module/kvm/parameters/fault_abi", "r");
	*text = 0;
	if (file) {
		if (fscanf(file, "%63s", text) != 1)
			*text = 0;
		fclose(file);
	}
	return text;
}

/* The ABI that the library ought to find, or NULL. For a kernel that has one of its own, KVMFAULT_TEST_ABI tells. */
static const struct abi *expected_abi(void)
{
	const char *told = getenv("KVMFAULT_TEST_ABI");
	for (const struct abi *abi = abis; abi < abis + ABIS; abi++)
		if (told ? !strcmp(told, abi->name) : !strcmp(fault_abi(), abi->parameter))
			return abi;
	return NULL;
}

static const struct abi *require_flag(void)
{
	const struct abi *abi = expected_abi();
	if (!abi)
		skip("this kernel's KVM has no fast-only memslot flag");
	return abi;
}

static int open_kvm(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		skip("/dev/kvm: %s", strerror(errno));
	return kvm;
}

/* ---- a VM with one slot under test ---- */

struct scene {
	struct machine m;
	struct ram ram;
	struct source source;
	uint32_t *list;
	uint64_t list_gpa, pages;
	atomic_ulong here, elsewhere; /* resolver calls on the thread of the vCPU that faulted; on another one */
	atomic_ulong written;         /* bytes that the library wrote for the guest */
	_Atomic uint8_t *was_written; /* of each page */
};

static _Thread_local int my_vcpu = -1;

static int scene_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct scene *s = opaque;
	if (my_vcpu >= 0) {
		EQUAL("the vCPU whose thread the resolver runs on", my_vcpu, fault->vcpu);
		EQUAL("origin", fault->origin, KVMFAULT_ORIGIN_VCPU);
		s->here++;
	} else {
		s->elsewhere++;
	}
	s->source.total++;
	int ret = source_install(&s->source, vm, s->source.window ? fault->window_gpa : fault->gpa,
				 s->source.window ? fault->window_len : fault->len);
	return ret < 0 && ret != -EEXIST ? ret : KVMFAULT_RESOLVED;
}

static void scene_written(void *opaque, uint64_t gpa, uint64_t len)
{
	struct scene *s = opaque;
	s->written += len;
	for (uint64_t at = gpa / PAGE * PAGE; at < gpa + len; at += PAGE)
		s->was_written[(at - RAM_GPA) / PAGE] = 1;
}

static void scene_attach(struct scene *s, enum backing backing, uint64_t len, int mechanism, const char *abi)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	memset(s, 0, sizeof(*s));
	ram_create(&s->ram, backing, len);
	s->pages = s->ram.len / PAGE;
	machine_create(&s->m, s->pages * sizeof(uint32_t));
	source_create(&s->source, RAM_GPA, s->ram.len, PATTERN);
	s->was_written = calloc(s->pages, 1);
	s->list = machine_share(&s->m, s->pages * sizeof(uint32_t), &s->list_gpa);
	list_sequential(s->list, s->pages);
	options.mechanism = mechanism;
	options.abi = abi;
	options.resolver = scene_resolve;
	options.written = scene_written;
	options.opaque = s;
	machine_attach(&s->m, &s->source, &options);
}

static void scene_create(struct scene *s, enum backing backing, uint64_t len, uint32_t flags, uint32_t kvm_flags)
{
	scene_attach(s, backing, len, test_mechanism(), NULL);
	struct kvmfault_memslot slot = slot_on(&s->ram, RAM_SLOT, RAM_GPA);
	slot.flags |= flags;
	slot.kvm_flags = kvm_flags;
	OK(kvmfault_memslot_set(s->m.library, &slot));
	EQUAL("the slot's mechanism", kvmfault_memslot_mechanism(s->m.library, RAM_SLOT), test_mechanism());
}

static void scene_destroy(struct scene *s)
{
	machine_destroy(&s->m);
	ram_destroy(&s->ram);
	source_destroy(&s->source);
	free((void *)s->was_written);
}

/* A vCPU for this thread. */
static struct vcpu *add_vcpu(struct scene *s, int cpl)
{
	struct vcpu *v = machine_add_vcpu(&s->m, cpl);
	my_vcpu = v->number;
	vcpu_attach(v);
	return v;
}

/* A reader thread wakes whoever waits before it notes that the page is present: the guest may be a moment ahead of it. */
static void expect_all_present(struct scene *s)
{
	for (double start = now(); kvmfault_pages_absent(s->m.library) && now() - start < 5;)
		poll(NULL, 0, 1);
	EQUAL("pages absent", kvmfault_pages_absent(s->m.library), 0);
}

/* The guest checks pages of the list. */
static void visit(struct scene *s, struct vcpu *v, uint64_t first, uint64_t count, int mode)
{
	vcpu_load_verify(v, RAM_GPA, s->list_gpa + first * sizeof(*s->list), count, &s->source.pattern, mode);
	vcpu_verify(v);
}

static uint64_t read_word(struct scene *s, struct vcpu *v, uint64_t address);
static void write_word(struct scene *s, struct vcpu *v, uint64_t address, uint64_t value);

/* One step of guest/script.S; the steps lie on the vCPU's stack page, which that guest doesn't use. */
static struct step *one_step(struct scene *s, struct vcpu *v, struct step step)
{
	struct step *steps = (struct step *)(s->m.low + v->stack);
	steps[0] = step;
	steps[1] = (struct step){ STOP, 0, 0, 0 };
	vcpu_load_script(v, v->stack);
	return steps;
}

static uint64_t read_word(struct scene *s, struct vcpu *v, uint64_t address)
{
	struct step *steps = one_step(s, v, (struct step){ READ64, address, 0, 0 });
	vcpu_run(v);
	return steps[0].value;
}

static void write_word(struct scene *s, struct vcpu *v, uint64_t address, uint64_t value)
{
	one_step(s, v, (struct step){ WRITE64, address, value, 0 });
	vcpu_run(v);
}

/* ---- recognising it ---- */

/* The probe finds the kernel's ABI with no hint, or none; and what it says is what can be had. */
static void recognised(void)
{
	const struct abi *abi = expected_abi();
	const char *name = abi ? abi->name : "";
	int kvm = open_kvm();
	for (int i = 0; i < 2; i++) {
		struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
		uint32_t bit = 1u << KVMFAULT_MECHANISM_MEMSLOT_FLAG, expected = abi ? bit : 0;
		OK(kvmfault_probe(i ? -1 : kvm, &probe));
		CHECK(!strcmp(probe.abi, name), "kvmfault_probe.abi is \"%s\", not \"%s\" (kvm.fault_abi is \"%s\")", probe.abi, name,
		      fault_abi());
		EQUAL("memslot-flag for anonymous memory", probe.mechanisms_anon & bit, expected);
		EQUAL("memslot-flag for shared memory", probe.mechanisms_shared & bit, expected);
		EQUAL("memslot-flag for hugetlb memory", probe.mechanisms_hugetlb & bit, expected);
	}
	printf("KVM's ABI: %s\n", abi ? name : "none");
}

static char *explanation(int kvm)
{
	int length = (int)OK(kvmfault_explain(kvm, NULL, 0));
	char *text = malloc(length + 1);
	CHECK(text, "no memory");
	EQUAL("length of the explanation", kvmfault_explain(kvm, text, length + 1), length);
	return text;
}

/* The line of the explanation that tells of a row; NULL if none does. */
static const char *line_of(char *text, const char *row)
{
	for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
		const char *start = line + strspn(line, " ");
		size_t length = strlen(row);
		if (start > line && !strncmp(start, row, length) && start[length] == ' ' && strstr(start, ": "))
			return start;
	}
	return NULL;
}

/* Capability numbers and accepted flags that mean something else, or nothing, are not believed. */
static void false_friends(void)
{
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	int kvm = open_kvm();
	bool friendly = !strcmp(fault_abi(), "falsefriend");
	if (expected_abi())
		skip("this kernel's KVM has the flag");
	if (!friendly && ioctl(kvm, KVM_CHECK_EXTENSION, CAP_PRE_FAULT_MEMORY) <= 0)
		skip("this KVM reports none of the flag's capability numbers");
	OK(kvmfault_probe(kvm, &probe));
	CHECK(!*probe.abi, "\"%s\" was believed", probe.abi);
	for (const struct abi *abi = abis; abi < abis + ABIS; abi++) {
		char *text = explanation(kvm);
		const char *line = line_of(text, abi->name);
		CHECK(line && strstr(line, ": no: "), "the explanation of %s: %s", abi->name, line ? line : "none");
		/* v2 has a mask to enable, of which the false friend takes all; mainline's 236 makes v7 worth a try. */
		if (friendly && strcmp(abi->name, "v7") != 0)
			CHECK(strstr(line, "accepted, but") || strstr(line, "does not exit"), "the explanation: %s", line);
		if (!friendly && !strcmp(abi->name, "v7"))
			CHECK(strstr(line, "a memslot with flag 0x8"), "the explanation: %s", line);
		printf("%s\n", line);
		free(text);
	}
}

/* Without the flag, forcing it fails with a reason, and not forcing it gives something else that works. */
static void absent(void)
{
	struct machine m;
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vm *vm;
	if (expected_abi())
		skip("this kernel's KVM has the flag");
	machine_create(&m, 0);
	options.kvm_fd = m.kvm;
	options.vm_fd = m.vm;
	options.resolver = scene_resolve;
	options.mechanism = KVMFAULT_MECHANISM_MEMSLOT_FLAG;
	REFUSED(kvmfault_vm_new(&options, &vm), EOPNOTSUPP, "memslot-flag");
	CHECK(!vm, "a handle comes with the error");
	machine_destroy(&m);

	struct scene s;
	scene_attach(&s, MEMFD, 64 * PAGE, KVMFAULT_MECHANISM_AUTO, NULL);
	CHECK(kvmfault_vm_mechanism(s.m.library) != KVMFAULT_MECHANISM_MEMSLOT_FLAG, "auto took the flag");
	machine_set_slot(&s.m, &s.ram, RAM_SLOT, RAM_GPA);
	visit(&s, add_vcpu(&s, 3), 0, s.pages, READ_FIRST);
	scene_destroy(&s);
}

/* kvmfault_vm_options.abi: the right name works, any other is tried, and refused with its name. */
static void named(void)
{
	const struct abi *right = expected_abi();
	for (const struct abi *abi = abis; abi < abis + ABIS; abi++) {
		if (abi == right) {
			struct scene s;
			scene_attach(&s, ANON, 64 * PAGE, KVMFAULT_MECHANISM_MEMSLOT_FLAG, abi->name);
			machine_set_slot(&s.m, &s.ram, RAM_SLOT, RAM_GPA);
			visit(&s, add_vcpu(&s, 0), 0, s.pages, READ_FIRST);
			EQUAL("resolver calls on the vCPU's thread", s.here, s.pages);
			vcpu_detach(s.m.vcpu[0]);
			scene_destroy(&s);
			continue;
		}
		for (int mechanism = KVMFAULT_MECHANISM_AUTO; mechanism <= KVMFAULT_MECHANISM_MEMSLOT_FLAG; mechanism++) {
			struct machine m;
			struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
			struct kvmfault_vm *vm;
			machine_create(&m, 0);
			options.kvm_fd = m.kvm;
			options.vm_fd = m.vm;
			options.resolver = scene_resolve;
			options.mechanism = mechanism;
			options.abi = abi->name;
			REFUSED(kvmfault_vm_new(&options, &vm), EOPNOTSUPP, abi->name);
			options.abi = "v0";
			REFUSED(kvmfault_vm_new(&options, &vm), EINVAL, "v0");
			machine_destroy(&m);
		}
	}
}

/* ---- on from the start ---- */

/* The resolver runs on the faulting vCPU's thread (with `userfaultfd`, on none of them), for reads and writes, in both rings. */
static void on_thread(enum backing backing)
{
	bool uffd = test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD;
	for (int mode = READ_FIRST; mode <= WRITE_FIRST; mode++) {
		struct scene s;
		scene_create(&s, backing, backing == HUGETLB ? 4 * HUGE_PAGE : 2ul << 20, 0, 0);
		list_shuffle(s.list, s.pages, 7);
		struct vcpu *ring3 = add_vcpu(&s, 3);
		visit(&s, ring3, 0, s.pages / 2, mode);
		vcpu_detach(ring3);
		struct vcpu *ring0 = add_vcpu(&s, 0);
		visit(&s, ring0, s.pages / 2, s.pages - s.pages / 2, mode);
		vcpu_detach(ring0);
		unsigned long calls = s.ram.len / s.ram.page;
		/* Where CPL 0 is emulated, reads of it with userfaultfd and writes come by KVM's copy_from_user: still no MMIO. */
		EQUAL("resolver calls on the vCPU's thread", s.here, uffd ? 0 : calls);
		EQUAL("resolver calls elsewhere", s.elsewhere, uffd ? calls : 0);
		expect_all_present(&s);
		scene_destroy(&s);
	}
}

static void on_thread_anon(void)
{
	on_thread(ANON);
}

static void on_thread_memfd(void)
{
	on_thread(MEMFD);
}

static void on_thread_hugetlb(void)
{
	on_thread(HUGETLB);
}

/* KVM says what it found wanting; what the flag's ABI tells of the access reaches the resolver, and nothing false does. */
struct access_seen {
	struct source *source;
	uint32_t access;
};

static int access_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct access_seen *seen = opaque;
	seen->access = fault->access;
	return source_resolve(seen->source, vm, fault);
}

static void access_told(void)
{
	static const uint8_t ret = 0xc3;
	const struct abi *abi = require_flag();
	bool some = !strcmp(abi->name, "v4") || !strcmp(abi->name, "v7"), reads = !strcmp(abi->name, "v7");
	struct scene s;
	struct access_seen seen = { &s.source, 0 };
	scene_attach(&s, ANON, 128 * PAGE, KVMFAULT_MECHANISM_MEMSLOT_FLAG, NULL);
	kvmfault_vm_free(s.m.library);
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	options.mechanism = KVMFAULT_MECHANISM_MEMSLOT_FLAG;
	options.resolver = access_resolve;
	options.opaque = &seen;
	machine_attach(&s.m, &s.source, &options);
	machine_set_slot(&s.m, &s.ram, RAM_SLOT, RAM_GPA);
	struct vcpu *v = add_vcpu(&s, 0);
	read_word(&s, v, RAM_GPA);
	EQUAL("access of a read", seen.access, reads ? KVMFAULT_ACCESS_READ : 0);
	write_word(&s, v, RAM_GPA + PAGE, 1);
	EQUAL("access of a write", seen.access, some ? KVMFAULT_ACCESS_WRITE : 0);
	/* A page that begins with a `ret`, by the pattern. */
	uint64_t page = 2;
	while (page < s.pages && (uint8_t)pattern_word(&s.source.pattern, page, 0) != ret)
		page++;
	CHECK(page < s.pages, "no page of the pattern begins with a `ret`");
	one_step(&s, v, (struct step){ CALL, RAM_GPA + page * PAGE, 0, 0 });
	vcpu_run(v);
	EQUAL("access of an instruction fetch", seen.access, some ? KVMFAULT_ACCESS_EXEC : 0);
	scene_destroy(&s);
}

/* A VM ends and the next one begins at the same addresses: what is left of the first (a reader on its way out) doesn't touch it. */
static void next_vm(void)
{
	unsigned long rounds = scaled(24);
	uint8_t *last = NULL;
	unsigned same = 0;
	for (unsigned long round = 0; round < rounds; round++) {
		struct scene s;
		scene_create(&s, round % 2 ? MEMFD : ANON, 16 * PAGE, 0, 0);
		same += s.ram.hva == last;
		last = s.ram.hva;
		visit(&s, add_vcpu(&s, 3), 0, s.pages, READ_FIRST);
		scene_destroy(&s);
	}
	printf("%lu VMs, %u at the addresses of the one before\n", rounds, same);
}

/* ---- on and off under a live slot ---- */

/* Off, faults come by userfaultfd; on, to the vCPU. What was brought in one way stays for the other. */
static void on_and_off(void)
{
	bool uffd = test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD;
	enum { STEP = 32, STEPS = 9 };
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct scene s;
		scene_create(&s, backing, (uint64_t)STEP * STEPS * PAGE, KVMFAULT_MEMSLOT_SLOW, 0);
		struct vcpu *v = add_vcpu(&s, 3);
		for (uint64_t step = 0; step < STEPS; step++) {
			bool on = step % 2;
			unsigned long here = s.here, elsewhere = s.elsewhere;
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, on));
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, on));
			visit(&s, v, step * STEP, STEP, step % 3 ? READ_FIRST : WRITE_FIRST);
			EQUAL("faults on the vCPU's thread", s.here - here, on && !uffd ? STEP : 0);
			EQUAL("faults on reader threads", s.elsewhere - elsewhere, on && !uffd ? 0 : STEP);
			/* Pages of the steps before, too: KVM may have forgotten them. */
			for (uint64_t page = 0; page < step * STEP; page++)
				EQUAL("a word of an earlier step", read_word(&s, v, RAM_GPA + page * PAGE),
				      pattern_word(&s.source.pattern, page, 0));
		}
		EQUAL("resolver calls", s.source.total, s.pages);
		REFUSED(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 2), EINVAL, "on");
		REFUSED(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT + 1, 1), ENOENT, "slot");
		vcpu_detach(v);
		scene_destroy(&s);
	}
}

static atomic_bool toggling;
static atomic_ulong toggles;

static void *toggle(void *opaque)
{
	struct scene *s = opaque;
	for (int on = 0; toggling; on = !on, toggles++) {
		OK(kvmfault_memslot_set_fast_only(s->m.library, RAM_SLOT, on));
		poll(NULL, 0, on ? 3 : 1); /* emulated machines need a while to get anything done in between */
	}
	return NULL;
}

struct share {
	struct scene *scene;
	uint64_t first, count;
};

static void *verify_share(struct vcpu *v)
{
	struct share *share = v->opaque;
	my_vcpu = v->number;
	vcpu_attach(v);
	visit(share->scene, v, share->first, share->count, READ_FIRST);
	vcpu_detach(v);
	return NULL;
}

/* As a post-copy that begins and ends: another thread turns the flag on and off while vCPUs touch absent pages. */
static void toggled(enum backing backing)
{
	enum { VCPUS = 3, MOST_ROUNDS = 40 };
	bool uffd = test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD;
	unsigned rounds = 0, enough = (unsigned)scaled(4);
	struct share shares[VCPUS];
	struct scene s;
	pthread_t thread;
	scene_create(&s, backing, 8ul << 20, 0, 0);
	list_shuffle(s.list, s.pages, 99);
	for (int i = 0; i < VCPUS; i++)
		machine_add_vcpu(&s.m, i % 2 ? 0 : 3);
	toggling = true;
	CHECK(!pthread_create(&thread, NULL, toggle, &s), "pthread_create");
	for (; rounds < MOST_ROUNDS && (rounds < enough || !s.elsewhere || (!uffd && !s.here)); rounds++) {
		for (uint64_t i = 0; i < VCPUS; i++) {
			shares[i] = (struct share){ &s, s.pages * i / VCPUS, s.pages * (i + 1) / VCPUS - s.pages * i / VCPUS };
			vcpu_start(s.m.vcpu[i], verify_share, &shares[i]);
		}
		for (int i = 0; i < VCPUS; i++)
			vcpu_join(s.m.vcpu[i]);
		expect_all_present(&s);
		EQUAL("resolver calls", s.source.total, s.pages * (rounds + 1));
		pattern_check(&s.source.pattern, s.ram.hva, 0, s.pages);
		OK(kvmfault_pages_discard(s.m.library, RAM_GPA, s.ram.len));
	}
	toggling = false;
	pthread_join(thread, NULL);
	printf("%lu toggles, %u rounds, %lu faults on vCPU threads, %lu on reader threads\n", (unsigned long)toggles, rounds,
	       (unsigned long)s.here, (unsigned long)s.elsewhere);
	CHECK(uffd || s.here, "no fault came to a vCPU's thread");
	CHECK(s.elsewhere, "no fault came to a reader thread");
	scene_destroy(&s);
}

static void toggled_anon(void)
{
	toggled(ANON);
}

static void toggled_memfd(void)
{
	toggled(MEMFD);
}

/* ---- dirty logging ---- */

static void get_dirty_log(struct scene *s, uint64_t *log)
{
	struct kvm_dirty_log get = { .slot = RAM_SLOT, .dirty_bitmap = log };
	memset(log, 0, s->pages / 8);
	SYS(ioctl(s->m.vm, KVM_GET_DIRTY_LOG, &get));
}

static bool is_dirty(const struct scene *s, const uint64_t *log, uint64_t page)
{
	return log[page / 64] >> (page % 64) & 1 || s->was_written[page];
}

static void set_logging(struct scene *s, bool on)
{
	struct kvmfault_memslot slot = slot_on(&s->ram, RAM_SLOT, RAM_GPA);
	slot.kvm_flags = on ? KVM_MEM_LOG_DIRTY_PAGES : 0;
	OK(kvmfault_memslot_set(s->m.library, &slot));
}

/*
 * What the guest writes is in the log (or told by the library, where that wrote), and what it doesn't touch isn't. What it reads may be: without
 * hardware help KVM logs a page when it maps it writable.
 */
static void expect_logged(struct scene *s, struct vcpu *v, uint64_t first, uint64_t count)
{
	uint64_t log[s->pages / 64];
	get_dirty_log(s, log);
	memset((void *)s->was_written, 0, s->pages);
	for (uint64_t page = first; page < first + count; page++) {
		if (page % 2)
			write_word(s, v, RAM_GPA + page * PAGE + 8, page);
		else
			EQUAL("a word", read_word(s, v, RAM_GPA + page * PAGE), pattern_word(&s->source.pattern, page, 0));
	}
	get_dirty_log(s, log);
	for (uint64_t page = 0; page < s->pages; page++) {
		bool touched = page >= first && page < first + count;
		if (is_dirty(s, log, page) ? !touched : touched && page % 2)
			FAIL("page %lu of %s memory is %s the log (CPL %d, pages [%lu, +%lu))", page, backing_name(s->ram.backing),
			     touched ? "missing in" : "in", v->cpl, first, count);
	}
}

static void dirty_log(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		for (int cpl = 0; cpl <= 3; cpl += 3) {
			struct scene s;
			scene_create(&s, backing, 512 * PAGE, 0, KVM_MEM_LOG_DIRTY_PAGES);
			struct vcpu *v = add_vcpu(&s, cpl);
			expect_logged(&s, v, 0, 64);
			expect_logged(&s, v, 0, 128); /* pages that are present, and more */
			/* Turned off and on with absent pages about: by a VMM that begins to migrate. */
			set_logging(&s, false);
			visit(&s, v, 128, 64, WRITE_FIRST);
			set_logging(&s, true);
			expect_logged(&s, v, 120, 128);
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 0));
			expect_logged(&s, v, 240, 64);
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 1));
			expect_logged(&s, v, 300, 64);
			set_logging(&s, false);
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 0));
			set_logging(&s, true);
			expect_logged(&s, v, 360, 64);
			vcpu_detach(v);
			scene_destroy(&s);
		}
	}
}

static void *toggle_logging(void *opaque)
{
	for (int on = 0; toggling; on = !on, toggles++) {
		set_logging(opaque, on);
		poll(NULL, 0, 2);
	}
	return NULL;
}

static void *write_share(struct vcpu *v)
{
	struct share *share = v->opaque;
	my_vcpu = v->number;
	vcpu_attach(v);
	visit(share->scene, v, share->first, share->count, WRITE_FIRST);
	vcpu_detach(v);
	return NULL;
}

/* The log turned on and off while vCPUs write to absent pages: no byte is lost. */
static void dirty_log_toggled(void)
{
	struct scene s;
	struct share shares[2];
	pthread_t thread;
	scene_create(&s, MEMFD, 8ul << 20, 0, 0);
	list_shuffle(s.list, s.pages, 5);
	toggling = true;
	CHECK(!pthread_create(&thread, NULL, toggle_logging, &s), "pthread_create");
	for (uint64_t i = 0; i < 2; i++) {
		shares[i] = (struct share){ &s, s.pages / 2 * i, s.pages / 2 };
		vcpu_start(machine_add_vcpu(&s.m, i ? 0 : 3), write_share, &shares[i]);
	}
	vcpu_join(s.m.vcpu[0]);
	vcpu_join(s.m.vcpu[1]);
	toggling = false;
	pthread_join(thread, NULL);
	for (uint64_t page = 0; page < s.pages; page++) {
		const uint64_t *words = (const uint64_t *)(s.ram.hva + page * PAGE);
		EQUAL("the first word", words[0], pattern_word(&s.source.pattern, page, 0));
		EQUAL("the last word", words[511], ~pattern_word(&s.source.pattern, page, 511));
	}
	EQUAL("resolver calls", s.source.total, s.pages);
	printf("%lu toggles\n", (unsigned long)toggles);
	scene_destroy(&s);
}

/* ---- read-only slots ---- */

/* The guest reads what the resolver brought; its writes are the VMM's, as MMIO exits. */
static void expect_read_only(struct scene *s)
{
	struct vcpu *v = add_vcpu(s, 3);
	visit(s, v, 0, s->pages / 2, READ_FIRST);
	for (uint64_t page = 0; page < s->pages; page += s->pages - 1) { /* present, and absent */
		one_step(s, v, (struct step){ WRITE64, RAM_GPA + page * PAGE + 16, 42, 0 });
		int ret = kvmfault_vcpu_run(v->handle);
		CHECK(ret == KVMFAULT_PASS && v->run->exit_reason == KVM_EXIT_MMIO && v->run->mmio.is_write, "%s", vcpu_describe(v, ret));
		EQUAL("the address", v->run->mmio.phys_addr, RAM_GPA + page * PAGE + 16);
		vcpu_run(v);
	}
	visit(s, v, 0, s->pages, READ_FIRST);
	vcpu_detach(v);
}

/* With READONLY a mechanism works or is refused with the reason; never does a guest exit for ever. */
static void read_only(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct scene s;
		const struct abi *abi = expected_abi();
		bool able = test_mechanism() != KVMFAULT_MECHANISM_MEMSLOT_FLAG || abi->readonly;
		scene_attach(&s, backing, 64 * PAGE, test_mechanism(), NULL);
		struct kvmfault_memslot slot = slot_on(&s.ram, RAM_SLOT, RAM_GPA);
		slot.kvm_flags = KVM_MEM_READONLY;
		if (!able) {
			REFUSED(kvmfault_memslot_set(s.m.library, &slot), EOPNOTSUPP, "READONLY");
			EQUAL("the slot", kvmfault_memslot_mechanism(s.m.library, RAM_SLOT), -ENOENT);
			slot.kvm_flags = 0;
			OK(kvmfault_memslot_set(s.m.library, &slot)); /* the memory is as it was */
			visit(&s, add_vcpu(&s, 3), 0, s.pages, WRITE_FIRST);
		} else {
			OK(kvmfault_memslot_set(s.m.library, &slot));
			expect_read_only(&s);
		}
		scene_destroy(&s);
	}
}

/* Without a mechanism forced, a read-only slot gets one that can, beside a writable slot that has the flag. */
static void read_only_automatic(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		const struct abi *abi = expected_abi();
		struct scene s;
		struct ram other;
		scene_attach(&s, backing, 64 * PAGE, KVMFAULT_MECHANISM_AUTO, NULL);
		struct kvmfault_memslot slot = slot_on(&s.ram, RAM_SLOT, RAM_GPA);
		slot.kvm_flags = KVM_MEM_READONLY;
		OK(kvmfault_memslot_set(s.m.library, &slot));
		ram_create(&other, backing, 64 * PAGE);
		slot = slot_on(&other, RAM_SLOT + 1, RAM_GPA + (1ul << 30));
		OK(kvmfault_memslot_set(s.m.library, &slot));
		int with = kvmfault_memslot_mechanism(s.m.library, RAM_SLOT);
		int without = kvmfault_memslot_mechanism(s.m.library, RAM_SLOT + 1);
		printf("%s: read-only by %s, writable by %s\n", backing_name(backing), mechanism_name(with), mechanism_name(without));
		EQUAL("the read-only slot has the flag", with == KVMFAULT_MECHANISM_MEMSLOT_FLAG, abi && abi->readonly);
		EQUAL("the writable slot has the flag", without == KVMFAULT_MECHANISM_MEMSLOT_FLAG, abi != NULL);
		expect_read_only(&s);
		scene_destroy(&s);
		ram_destroy(&other);
	}
}

/* A read-only window of memory that is writable elsewhere, as QEMU's PAM regions are: where the flag doesn't go with READONLY, the window goes
 * without, and is served all the same. */
static void read_only_window(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct scene s;
		const struct abi *abi = expected_abi();
		bool able = test_mechanism() != KVMFAULT_MECHANISM_MEMSLOT_FLAG || abi->readonly;
		scene_attach(&s, backing, 64 * PAGE, test_mechanism(), NULL);
		struct kvmfault_memslot slot = slot_on(&s.ram, RAM_SLOT, RAM_GPA);
		slot.block_hva = s.ram.hva;
		slot.block_len = s.ram.len;
		slot.len = 32 * PAGE;
		OK(kvmfault_memslot_set(s.m.library, &slot));
		slot.slot = RAM_SLOT + 1;
		slot.gpa += slot.len;
		slot.hva = s.ram.hva + slot.len;
		slot.kvm_flags = KVM_MEM_READONLY;
		OK(kvmfault_memslot_set(s.m.library, &slot));
		struct vcpu *v = add_vcpu(&s, 3);
		visit(&s, v, 0, 32, WRITE_FIRST);
		visit(&s, v, 32, 16, READ_FIRST);
		if (able)
			OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT + 1, 1));
		else
			REFUSED(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT + 1, 1), EOPNOTSUPP, "READONLY");
		one_step(&s, v, (struct step){ WRITE64, slot.gpa + 16, 42, 0 });
		int ret = kvmfault_vcpu_run(v->handle);
		CHECK(ret == KVMFAULT_PASS && v->run->exit_reason == KVM_EXIT_MMIO && v->run->mmio.is_write, "%s", vcpu_describe(v, ret));
		vcpu_run(v);
		visit(&s, v, 32, 32, READ_FIRST);
		vcpu_detach(v);
		scene_destroy(&s);
	}
}

/* ---- present, but not as the access wants it ---- */

/* Zeros are the shared zero page in private memory, which can't be written: KVM's fast path fails though nothing is absent. */
static void zero_page(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		for (int cpl = 0; cpl <= 3; cpl += 3) {
			struct scene s;
			scene_create(&s, backing, 96 * PAGE, 0, 0);
			struct vcpu *v = add_vcpu(&s, cpl);
			OK(kvmfault_pages_zero(s.m.library, RAM_GPA, 64 * PAGE));
			for (uint64_t page = 0; page < 64; page++) {
				uint64_t address = RAM_GPA + page * PAGE + 8 * page;
				if (page % 2)
					EQUAL("a zero page", read_word(&s, v, address), 0);
				write_word(&s, v, address, page + 1);
				EQUAL("what was written", read_word(&s, v, address), page + 1);
				EQUAL("what the host sees", *(uint64_t *)(s.ram.hva + (address - RAM_GPA)), page + 1);
			}
			EQUAL("resolver calls", s.source.total, 0);
			visit(&s, v, 64, 32, READ_FIRST);
			vcpu_detach(v);
			scene_destroy(&s);
		}
	}
}

/* A fork makes private pages copy-on-write, those that KVM has mapped as well; shared memory stays shared. */
static void forked(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct scene s;
		char byte;
		int quit[2];
		scene_create(&s, backing, 256 * PAGE, 0, 0);
		struct vcpu *v = add_vcpu(&s, 3);
		visit(&s, v, 0, 64, READ_FIRST);                 /* mapped by KVM */
		OK(source_install(&s.source, s.m.library, RAM_GPA + 64 * PAGE, 64 * PAGE)); /* present, and not mapped by KVM */
		SYS(pipe(quit));
		pid_t child = SYS(fork());
		if (child == 0) {
			close(quit[1]);
			if (read(quit[0], &byte, 1) < 0)
				_exit(1);
			/* Private memory is the child's own copy. */
			for (uint64_t page = 0; page < 128; page++)
				if (backing == ANON && *(uint64_t *)(s.ram.hva + page * PAGE + 4088) != pattern_word(&s.source.pattern, page, 511))
					_exit(2);
			_exit(0);
		}
		visit(&s, v, 0, 192, WRITE_FIRST);
		for (uint64_t page = 0; page < 192; page++)
			EQUAL("what the host sees", *(uint64_t *)(s.ram.hva + page * PAGE + 4088),
			      ~pattern_word(&s.source.pattern, page, 511));
		int status;
		close(quit[1]);
		waitpid(child, &status, 0);
		EQUAL("the child's memory is as it was at the fork", status, 0);
		visit(&s, v, 192, 64, WRITE_FIRST);
		vcpu_detach(v);
		scene_destroy(&s);
	}
}

/* The memory was read-only for a while, so that the host's page tables are. */
static void protected_once(void)
{
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct scene s;
		scene_create(&s, backing, 256 * PAGE, 0, 0);
		struct vcpu *v = add_vcpu(&s, 3);
		visit(&s, v, 0, 64, READ_FIRST);
		OK(source_install(&s.source, s.m.library, RAM_GPA + 64 * PAGE, 64 * PAGE));
		SYS(mprotect(s.ram.hva, s.ram.len, PROT_READ));
		SYS(mprotect(s.ram.hva, s.ram.len, PROT_READ | PROT_WRITE));
		visit(&s, v, 0, 256, WRITE_FIRST);
		vcpu_detach(v);
		scene_destroy(&s);
	}
}

/* Swapped out, or dropped from the page tables: present for the library, and not for KVM's fast path. */
static void dropped_mappings(void)
{
	struct scene s;
	scene_create(&s, MEMFD, 256 * PAGE, 0, 0);
	struct vcpu *v = add_vcpu(&s, 3);
	for (int round = 0; round < 4; round++) {
		visit(&s, v, 0, 192, READ_FIRST);
		/* Of shared memory MADV_DONTNEED forgets the mapping and keeps the bytes. */
		SYS(madvise(s.ram.hva, 128 * PAGE, MADV_DONTNEED));
		visit(&s, v, 0, 192, round % 2 ? READ_FIRST : WRITE_FIRST);
		for (uint64_t page = 0; page < 192; page++)
			write_word(&s, v, RAM_GPA + page * PAGE + 4088, pattern_word(&s.source.pattern, page, 511));
	}
	EQUAL("resolver calls", s.source.total, 192);
	vcpu_detach(v);
	scene_destroy(&s);
}

/* ---- broken for good ---- */

/*
 * The VMM took memory away behind the library's back. KVM fails with an EFAULT that says nothing (or, by some ABIs, says where): the
 * vCPU's loop ends with an error, soon. A memfd's poison-trap alias doesn't suffer from what happens to the VMM's mapping.
 */
static bool told_where(struct vcpu *v, int ret, uint64_t address)
{
	/* v7 tells of every access that failed. Where the library doesn't use the flag, that exit is the VMM's. */
	return ret == KVMFAULT_PASS && v->run->exit_reason == EXIT_MEMORY_FAULT &&
	       ((uint64_t *)&v->run->hw)[1] / PAGE == address / PAGE;
}

static void taken_away(bool unmapped)
{
	static const char *const what[] = { "absent", "present" };
	for (int backing = ANON; backing <= MEMFD; backing++) {
		for (int cpl = 0; cpl <= 3; cpl += 3) {
			for (int present = 0; present < 2; present++) {
				for (int write = 0; write < 2; write++) {
					struct scene s;
					uint64_t address = RAM_GPA + 5 * PAGE;
					bool alias = backing == MEMFD && test_mechanism() == KVMFAULT_MECHANISM_POISON_TRAP;
					scene_create(&s, backing, 64 * PAGE, 0, 0);
					struct vcpu *v = add_vcpu(&s, cpl);
					if (present)
						OK(source_install(&s.source, s.m.library, RAM_GPA, 64 * PAGE));
					/* The middle, in the same state throughout. */
					if (unmapped)
						SYS(munmap(s.ram.hva + 4 * PAGE, 4 * PAGE));
					else
						SYS(mprotect(s.ram.hva + 4 * PAGE, 4 * PAGE, PROT_NONE));
					struct step *steps =
						one_step(&s, v, (struct step){ write ? WRITE64 : READ64, address, 1, 0 });
					double start = now();
					alarm(60);
					int ret = kvmfault_vcpu_run(v->handle);
					alarm(0);
					double took = now() - start;
					if (told_where(v, ret, address))
						ret = -EFAULT;
					CHECK(ret < 0 || alias, "%s page, %s, write %d, CPL %d: %s", what[present],
					      backing_name(backing), write, cpl, vcpu_describe(v, ret));
					if (ret < 0) {
						CHECK(ret == -EFAULT || ret == -ELOOP || ret == -ENOENT, "%s", vcpu_describe(v, ret));
						printf("%s, %s, %s, CPL %d: %s\n", backing_name(backing), what[present],
						       write ? "write" : "read", cpl, kvmfault_last_error());
					} else if (!write) {
						EQUAL("a word, by KVM's own mapping", steps[0].value,
						      pattern_word(&s.source.pattern, 5, 0));
					}
					CHECK(took < 10, "it took %.1f s", took);
					if (ret < 0 && !unmapped) {
						/* Mended, the guest repeats the access. */
						SYS(mprotect(s.ram.hva + 4 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE));
						vcpu_run(v);
						if (!write)
							EQUAL("a word, after all", steps[0].value,
							      pattern_word(&s.source.pattern, 5, 0));
						visit(&s, v, 8, 56, READ_FIRST);
					}
					vcpu_detach(v);
					scene_destroy(&s);
				}
			}
		}
	}
}

static void unmapped(void)
{
	taken_away(true);
}

static void inaccessible(void)
{
	taken_away(false);
}

/* The mapping is read-only, for good: reads work, writes end in an error. */
static void not_writable(void)
{
	struct scene s;
	scene_create(&s, ANON, 64 * PAGE, 0, 0);
	struct vcpu *v = add_vcpu(&s, 3);
	OK(source_install(&s.source, s.m.library, RAM_GPA, 32 * PAGE));
	SYS(mprotect(s.ram.hva, s.ram.len, PROT_READ));
	one_step(&s, v, (struct step){ WRITE64, RAM_GPA, 1, 0 });
	double start = now();
	alarm(60);
	int ret = kvmfault_vcpu_run(v->handle);
	alarm(0);
	CHECK(ret == -EFAULT || ret == -ELOOP || told_where(v, ret, RAM_GPA), "%s", vcpu_describe(v, ret));
	CHECK(now() - start < 10, "it took %.1f s", now() - start);
	printf("%s\n", kvmfault_last_error());
	SYS(mprotect(s.ram.hva, s.ram.len, PROT_READ | PROT_WRITE));
	vcpu_run(v);
	visit(&s, v, 1, 63, WRITE_FIRST);
	vcpu_detach(v);
	scene_destroy(&s);
}

/* ---- a VMM's own loop and ioctls ---- */

/* KVM_RUN's errno at a fault is the ABI's (v2's is EPERM, so that -errno is -1), and handle_exit takes it in either way. */
static void run_errno(void)
{
	const struct abi *abi = require_flag();
	for (int by_errno = 0; by_errno < 2; by_errno++) {
		struct scene s;
		uint32_t value;
		unsigned long failures = 0;
		scene_attach(&s, MEMFD, 128 * PAGE, KVMFAULT_MECHANISM_MEMSLOT_FLAG, NULL);
		machine_set_slot(&s.m, &s.ram, RAM_SLOT, RAM_GPA);
		struct vcpu *v = add_vcpu(&s, 0);
		vcpu_load_verify(v, RAM_GPA, s.list_gpa, s.pages, &s.source.pattern, READ_FIRST);
		for (;;) {
			int ret = ioctl(v->fd, KVM_RUN, 0), error = errno;
			if (ret < 0) {
				EQUAL("KVM_RUN's errno", error, abi->run_errno);
				failures++;
			}
			errno = error;
			ret = kvmfault_vcpu_handle_exit(v->handle, ret < 0 && !by_errno ? -error : ret);
			if (ret == KVMFAULT_HANDLED)
				continue;
			CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value) && value == 0, "%s", vcpu_describe(v, ret));
			break;
		}
		EQUAL("failures of KVM_RUN", failures, s.pages);
		EQUAL("resolver calls on the vCPU's thread", s.here, s.pages);
		/* The same errno without an exit of that kind is the VMM's: a stale exit is no fault. */
		unsigned long calls = s.source.total;
		errno = EPERM; /* -EPERM is -1, which means errno */
		EQUAL("EPERM without a fault", kvmfault_vcpu_handle_exit(v->handle, -EPERM), KVMFAULT_PASS);
		EQUAL("resolver calls", s.source.total, calls);
		vcpu_detach(v);
		scene_destroy(&s);
	}
}

/* Newer than some headers. */
struct region2 {
	uint32_t slot, flags;
	uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
	uint32_t guest_memfd, pad1;
	uint64_t userfault_bitmap, pad2[13];
};
#define SET_REGION2 _IOW(KVMIO, 0x49, struct region2)

static void own_ioctl(struct scene *s, const struct kvmfault_region *r)
{
	if (r->ioctl_version == 2) {
		struct region2 region = {
			.slot = r->slot, .flags = r->flags, .guest_phys_addr = r->guest_phys_addr, .memory_size = r->memory_size,
			.userspace_addr = r->userspace_addr, .userfault_bitmap = r->userfault_bitmap,
		};
		SYS(ioctl(s->m.vm, SET_REGION2, &region));
		return;
	}
	struct kvm_userspace_memory_region region = {
		.slot = r->slot, .flags = r->flags, .guest_phys_addr = r->guest_phys_addr, .memory_size = r->memory_size,
		.userspace_addr = r->userspace_addr,
	};
	SYS(ioctl(s->m.vm, KVM_SET_USER_MEMORY_REGION, &region));
}

/* kvmfault_memslot_prepare says what KVM is to be told, by which ioctl; the VMM tells it. */
static void prepared(void)
{
	const struct abi *abi = require_flag();
	for (int backing = ANON; backing <= MEMFD; backing++) {
		struct scene s;
		struct kvmfault_region region = KVMFAULT_REGION_INIT, logged = KVMFAULT_REGION_INIT;
		scene_attach(&s, backing, 256 * PAGE, KVMFAULT_MECHANISM_MEMSLOT_FLAG, NULL);
		OK(kvmfault_vm_enable(s.m.library, KVMFAULT_CAP_FAULT_EXITS));
		struct kvmfault_memslot slot = slot_on(&s.ram, RAM_SLOT, RAM_GPA);
		OK(kvmfault_memslot_prepare(s.m.library, &slot, &region));
		EQUAL("ioctl_version", region.ioctl_version, abi->ioctl_version);
		EQUAL("slot", region.slot, RAM_SLOT);
		EQUAL("flags", region.flags, abi->flag);
		EQUAL("guest_phys_addr", region.guest_phys_addr, RAM_GPA);
		EQUAL("memory_size", region.memory_size, s.ram.len);
		EQUAL("userspace_addr", region.userspace_addr, (uintptr_t)s.ram.hva);
		EQUAL("there is a bitmap", region.userfault_bitmap != 0, abi->bitmap);
		own_ioctl(&s, &region);
		struct vcpu *v = add_vcpu(&s, 3);
		visit(&s, v, 0, 64, READ_FIRST);
		EQUAL("resolver calls on the vCPU's thread", s.here, 64);
		if (abi->bitmap) {
			uint64_t *bits = (uint64_t *)(uintptr_t)region.userfault_bitmap;
			EQUAL("bits of present pages", bits[0], 0);
			EQUAL("bits of absent pages", bits[1], -1);
		}

		/* Logging on; the flag off and on by the library; logging off. */
		slot.kvm_flags = KVM_MEM_LOG_DIRTY_PAGES;
		OK(kvmfault_memslot_prepare(s.m.library, &slot, &logged));
		EQUAL("flags", logged.flags, abi->flag | KVM_MEM_LOG_DIRTY_PAGES);
		EQUAL("the bitmap is the same", logged.userfault_bitmap, region.userfault_bitmap);
		own_ioctl(&s, &logged);
		visit(&s, v, 64, 64, WRITE_FIRST);
		EQUAL("resolver calls on the vCPU's thread", s.here, 128);
		OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 0));
		visit(&s, v, 128, 32, WRITE_FIRST);
		EQUAL("resolver calls on reader threads", s.elsewhere, 32);
		uint64_t log[256 / 64];
		get_dirty_log(&s, log);
		CHECK(log[1] == ~0ul && log[2] == 0xffffffff && log[3] == 0, "the log is %#lx %#lx %#lx %#lx", log[0],
		      log[1], log[2], log[3]);
		OK(kvmfault_memslot_set_fast_only(s.m.library, RAM_SLOT, 1));
		visit(&s, v, 160, 32, READ_FIRST);
		slot.kvm_flags = 0;
		OK(kvmfault_memslot_prepare(s.m.library, &slot, &logged));
		EQUAL("flags", logged.flags, abi->flag);
		own_ioctl(&s, &logged);
		visit(&s, v, 192, 64, READ_FIRST);
		EQUAL("resolver calls on the vCPU's thread", s.here, 256 - 32);

		/* Deleted: first KVM, then the library. */
		slot.len = 0;
		region.memory_size = 0;
		region.flags = 0;
		own_ioctl(&s, &region);
		OK(kvmfault_memslot_prepare(s.m.library, &slot, &region));
		EQUAL("memory_size", region.memory_size, 0);
		vcpu_detach(v);
		scene_destroy(&s);
	}
}

/* With and without KVM_PRE_FAULT_MEMORY, which the flag must not be confused by. */
static void pre_fault(void)
{
	require_flag();
	for (int off = 0; off < 2; off++) {
		for (int backing = ANON; backing <= MEMFD; backing++) {
			struct scene s;
			scene_attach(&s, backing, 512 * PAGE, KVMFAULT_MECHANISM_MEMSLOT_FLAG, NULL);
			kvmfault_vm_free(s.m.library);
			struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
			options.mechanism = KVMFAULT_MECHANISM_MEMSLOT_FLAG;
			options.flags = off ? 0 : KVMFAULT_VM_PRE_FAULT;
			options.readahead = 8;
			s.source.window = true;
			machine_attach(&s.m, &s.source, &options);
			machine_set_slot(&s.m, &s.ram, RAM_SLOT, RAM_GPA);
			struct vcpu *v = add_vcpu(&s, 3);
			visit(&s, v, 0, 256, READ_FIRST);
			visit(&s, v, 256, 256, WRITE_FIRST);
			EQUAL("resolver calls", s.source.total, 512 / 8);
			vcpu_detach(v);
			scene_destroy(&s);
		}
	}
}

static const struct test_case cases[] = {
	{ "recognised", recognised, false },
	{ "false-friends", false_friends, false },
	{ "absent", absent, false },
	{ "named", named, false },
	{ "anon", on_thread_anon, true },
	{ "memfd", on_thread_memfd, true },
	{ "hugetlb", on_thread_hugetlb, true },
	{ "next-vm", next_vm, true },
	{ "access[memslot-flag]", access_told, false },
	{ "on-and-off", on_and_off, true },
	{ "toggled-anon", toggled_anon, true },
	{ "toggled-memfd", toggled_memfd, true },
	{ "dirty-log", dirty_log, true },
	{ "dirty-log-toggled", dirty_log_toggled, true },
	{ "read-only", read_only, true },
	{ "read-only-automatic", read_only_automatic, false },
	{ "read-only-window", read_only_window, true },
	{ "zero-page", zero_page, true },
	{ "forked", forked, true },
	{ "protected-once", protected_once, true },
	{ "dropped-mappings", dropped_mappings, true },
	{ "unmapped", unmapped, true },
	{ "inaccessible", inaccessible, true },
	{ "not-writable", not_writable, true },
	{ "run-errno[memslot-flag]", run_errno, false },
	{ "prepared[memslot-flag]", prepared, false },
	{ "pre-fault[memslot-flag]", pre_fault, false },
};
TEST_MAIN(cases)
