/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A small virtual machine for tests: ordinary low memory for page tables, code and lists; test memory that the library looks
 * after; vCPUs in long mode at CPL 0 or 3; and guests that check what they find (guest/ *.S).
 *
 * On KVMs without hardware virtualisation CPL 3 runs natively and CPL 0 is emulated instruction by instruction. Both are paths that
 * guests take through KVM, so most tests do both.
 */
#ifndef MACHINE_H
#define MACHINE_H

#include "ram.h"

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>

#define RAM_GPA 0x40000000ul      /* where test memory usually is */
#define GUEST_LIMIT 0x200000000ul /* the guest's page tables end here: 8 GiB, addresses equal physical ones */
#define NOWHERE_GPA 0x180000000ul /* reachable, and no memory is there */
#define RAM_SLOT 1
#define STOP_PORT 0x10
enum { MOST_VCPUS = 256 };

/* ---- the machine ---- */

struct machine {
	int kvm, vm;
	uint8_t *low; /* guest address 0 */
	uint64_t low_len, low_used;
	struct kvmfault_vm *library;
	bool finalized; /* machine_destroy waits until the library is done with its VM */
	unsigned vcpus;
	struct vcpu *vcpu[MOST_VCPUS];
};
/* `shared` bytes will be asked for with machine_share. */
void machine_create(struct machine *machine, uint64_t shared);
/* Frees the library's VM too, waits for resolver calls that are under way, and frees the vCPUs. */
void machine_destroy(struct machine *machine);
/* Memory for host and guest, zeros; *gpa is its guest address. */
void *machine_share(struct machine *machine, uint64_t len, uint64_t *gpa);
/* kvmfault_vm_new with the case's mechanism. `options` may be NULL; what is 0 there (mechanism, resolver) has the usual value. */
void machine_attach(struct machine *machine, struct source *source, const struct kvmfault_vm_options *options);
/* A slot on all of `ram`, ready for kvmfault_memslot_set. Private memory is declared as touched by vCPUs only. */
struct kvmfault_memslot slot_on(const struct ram *ram, uint32_t slot, uint64_t gpa);
void machine_set_slot(struct machine *machine, const struct ram *ram, uint32_t slot, uint64_t gpa);
/* Tells KVM what kvmfault_memslot_prepare said, as a VMM with ioctls of its own does. */
void machine_set_region(const struct machine *machine, const struct kvmfault_region *region);
struct kvmfault_stats machine_stats(const struct machine *machine);
/*
 * The same when all faults have been served. With userfaultfd the kernel lets a vCPU go on the moment its page is there: the guest
 * may be done with all of its memory while a reader thread is still booking the last page.
 */
struct kvmfault_stats machine_settled_stats(const struct machine *machine);

/* Does KVM emulate CPL 0 here? (As far as can be told: with the mechanism poison-trap.) */
bool cpl0_is_emulated(void);
/* Skips the case where a vCPU that sleeps for a page can't be made to leave: in userfaultfd before Linux 6.2. */
void require_interruptible_sleep(void);
/* The same with any mechanism, while the fast path of the slot is off. */
void require_interruptible_sleep_in_slow_slots(void);

/* Do accesses at CPL 0 to absent pages come as MMIO exits, with the case's mechanism? */
bool cpl0_comes_as_mmio(void);

/* ---- vCPUs ---- */

struct vcpu {
	struct machine *machine;
	int number, cpl, fd;
	struct kvm_run *run;
	struct kvmfault_vcpu *handle; /* NULL until vcpu_attach */
	uint64_t stack;
	pthread_t thread;
	void *(*main)(struct vcpu *);
	void *opaque; /* the case's */
};
struct vcpu *machine_add_vcpu(struct machine *machine, int cpl);
/* kvmfault_vcpu_new with the usual options; on the thread that will run it. */
void vcpu_attach(struct vcpu *vcpu);
void vcpu_detach(struct vcpu *vcpu);
/* Runs until the guest stops, and returns the value that it stops with; anything else fails the case. */
uint32_t vcpu_run(struct vcpu *vcpu);
/* After KVMFAULT_PASS: did the guest stop? */
bool vcpu_stopped(const struct vcpu *vcpu, uint32_t *value);
/* What a return value of run or handle_exit that wasn't expected means. */
const char *vcpu_describe(const struct vcpu *vcpu, int ret);
void vcpu_start(struct vcpu *vcpu, void *(*main)(struct vcpu *), void *opaque);
void vcpu_join(struct vcpu *vcpu);

/* ---- guests ---- */

enum { READ_FIRST = 0, WRITE_FIRST = 1 };
/* guest/verify.S: checks `count` pages of the list at guest address `list`, pages counted from `gpa`. */
void vcpu_load_verify(struct vcpu *vcpu, uint64_t gpa, uint64_t list, uint64_t count, const struct pattern *pattern, int mode);
/* Runs it, and fails the case with what the guest found if that is wrong. */
void vcpu_verify(struct vcpu *vcpu);
/* The same on a thread of its own, to be joined with vcpu_join; with a handle for as long. */
void vcpu_start_verify(struct vcpu *vcpu);
/* The latter half of it, for a loop of the case's own: what the guest has stopped with. */
void vcpu_check_verified(struct vcpu *vcpu, uint32_t stopped_with);
/* guest/touch.S */
void vcpu_load_touch(struct vcpu *vcpu, uint64_t gpa, uint64_t pages, uint64_t step);

/* guest/walk.S: writes to `count` pages of the list at guest address `list`, and notes at `times` how long each took. */
void vcpu_load_walk(struct vcpu *vcpu, uint64_t gpa, uint64_t list, uint64_t count, uint64_t times);

/* guest/script.S */
enum {
	STOP, READ8, READ16, READ32, READ64, WRITE8, WRITE16, WRITE32, WRITE64,
	JUMP,     /* to the step at `address` */
	ADD64,    /* atomically; `value` becomes what was there */
	CALL,     /* the code at `address`, with `value` in %rax; `value` becomes %rax */
	COPY,     /* `more` bytes from guest address `value`, with a string instruction */
	READ128, WRITE128, /* `value` and `more`; an SSE instruction */
	FILL,     /* `more` words of 64 bits */
};
struct step {
	uint64_t operation, address, value, more;
};
void vcpu_load_script(struct vcpu *vcpu, uint64_t first_step);

/* Lists of page numbers. */
void list_sequential(uint32_t *list, uint64_t count);
void list_shuffle(uint32_t *list, uint64_t count, uint64_t seed);

#endif
