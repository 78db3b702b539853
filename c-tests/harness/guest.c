/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "machine.h"

#include <string.h>
#include <sys/ioctl.h>

extern const uint8_t guest_verify_start[], guest_verify_end[];
extern const uint8_t guest_touch_start[], guest_touch_end[];
extern const uint8_t guest_script_start[], guest_script_end[];
extern const uint8_t guest_walk_start[], guest_walk_end[];

static const struct {
	const uint8_t *start, *end;
} guests[] = {
	{ guest_verify_start, guest_verify_end },
	{ guest_touch_start, guest_touch_end },
	{ guest_script_start, guest_script_end },
	{ guest_walk_start, guest_walk_end },
};
enum { VERIFY, TOUCH, SCRIPT, WALK, GUESTS };

void guest_copy_programs(uint8_t *low)
{
	for (int i = 0; i < GUESTS; i++) {
		CHECK(guests[i].end - guests[i].start <= (long)PAGE, "guest %d is longer than a page", i);
		memcpy(low + LOW_CODE + i * PAGE, guests[i].start, guests[i].end - guests[i].start);
	}
}

static void load(struct vcpu *v, int guest, struct kvm_regs *regs)
{
	regs->rip = LOW_CODE + guest * PAGE;
	regs->rsp = v->stack + PAGE;
	regs->rflags = 0x3002; /* I/O privilege level 3 */
	SYS(ioctl(v->fd, KVM_SET_REGS, regs));
}

void vcpu_load_verify(struct vcpu *v, uint64_t gpa, uint64_t list, uint64_t count, const struct pattern *pattern,
		      int mode)
{
	struct kvm_regs regs = {
		.rdi = gpa,
		.rsi = list,
		.rcx = count,
		.r8 = pattern->factor,
		.r9 = pattern->zero_mask,
		.r10 = v->cpl == 3 ? 1 : 73, /* emulation is slow */
		.r12 = mode,
	};
	load(v, VERIFY, &regs);
}

void vcpu_verify(struct vcpu *v)
{
	vcpu_check_verified(v, vcpu_run(v));
}

void vcpu_check_verified(struct vcpu *v, uint32_t stopped_with)
{
	struct kvm_regs r;
	if (stopped_with == 0)
		return;
	SYS(ioctl(v->fd, KVM_GET_REGS, &r));
	FAIL("vCPU %d (CPL %d) found %#llx at %#llx, not %#llx", v->number, v->cpl, r.rbx, r.rdi, r.rdx);
}

static void *verify(struct vcpu *v)
{
	vcpu_attach(v);
	vcpu_verify(v);
	vcpu_detach(v);
	return NULL;
}

void vcpu_start_verify(struct vcpu *v)
{
	vcpu_start(v, verify, NULL);
}

void vcpu_load_touch(struct vcpu *v, uint64_t gpa, uint64_t pages, uint64_t step)
{
	struct kvm_regs regs = { .rdi = gpa, .rcx = pages, .rdx = step };
	load(v, TOUCH, &regs);
}

void vcpu_load_walk(struct vcpu *v, uint64_t gpa, uint64_t list, uint64_t count, uint64_t times)
{
	struct kvm_regs regs = { .rdi = gpa, .rsi = list, .rcx = count, .r8 = times };
	load(v, WALK, &regs);
}

void vcpu_load_script(struct vcpu *v, uint64_t first_step)
{
	struct kvm_regs regs = { .rdi = first_step };
	load(v, SCRIPT, &regs);
}

void list_sequential(uint32_t *list, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		list[i] = (uint32_t)i;
}

void list_shuffle(uint32_t *list, uint64_t count, uint64_t seed)
{
	list_sequential(list, count);
	for (uint64_t i = count - 1; i > 0; i--) {
		uint64_t other = random_number(&seed) % (i + 1);
		uint32_t swap = list[i];
		list[i] = list[other];
		list[other] = swap;
	}
}
