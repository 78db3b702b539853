/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Emulated accesses that could not be finished at once, because of a kick, an error or a lost page.
 * None is forgotten, even if the handle is freed; and the VMM can give one up.
 */
#define _GNU_SOURCE
#include "resolver_vm.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

enum loop { RUN, OWN, OWN_RESUMES };
static enum loop loop;

static void attach(struct vcpu *v)
{
	struct kvmfault_vcpu_options options = KVMFAULT_VCPU_OPTIONS_INIT;
	options.fd = v->fd;
	options.run = v->run;
	options.flags = loop == OWN_RESUMES ? KVMFAULT_VCPU_RESUMES : 0;
	OK(kvmfault_vcpu_new(v->machine->library, &options, &v->handle));
}

/* Each function of the header's, as it says for a vCPU that was left. */
static int go_on(struct vcpu *v)
{
	int ret;
	if (loop == RUN)
		return kvmfault_vcpu_run(v->handle);
	if ((ret = kvmfault_vcpu_resume(v->handle)) != KVMFAULT_HANDLED)
		return ret;
	for (;;) {
		ret = kvmfault_vcpu_handle_exit(v->handle, ioctl(v->fd, KVM_RUN, 0));
		if (ret == KVMFAULT_HANDLED && loop == OWN_RESUMES)
			ret = kvmfault_vcpu_resume(v->handle);
		if (ret != KVMFAULT_HANDLED)
			return ret;
	}
}

static atomic_int answer, asked;

static int answer_or_install(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	asked++;
	return answer ? answer : source_install(&resolver_vm.source, vm, fault->gpa, fault->len);
}

static struct vcpu *set_up(int first_answer)
{
	if (first_answer == KVMFAULT_LOST ? !cpl0_is_emulated() : !cpl0_comes_as_mmio())
		skip("accesses at CPL 0 to such pages don't come as MMIO exits here with %s",
		     mechanism_name(test_mechanism()));
	answer = first_answer;
	asked = 0;
	resolver_vm_set_up(MEMFD, answer_or_install, 1, 0);
	attach(resolver_vm.m.vcpu[0]);
	return resolver_vm.m.vcpu[0];
}

static void tear_down(struct vcpu *v)
{
	vcpu_detach(v);
	resolver_vm_tear_down();
}

static void each_loop(void (*test)(void))
{
	for (loop = RUN; loop <= OWN_RESUMES; loop++)
		test();
}

/* Reads across the border of two pages, then writes across another; all four are absent. */
static void load_crossing(struct vcpu *v)
{
	resolver_vm.steps[0] = (struct step){ READ64, RAM_GPA + PAGE - 3, 0, 0 };
	resolver_vm.steps[1] = (struct step){ WRITE64, RAM_GPA + 3 * PAGE - 2, 0x1122334455667788, 0 };
	resolver_vm.steps[2] = (struct step){ STOP, 0, 5, 0 };
	vcpu_load_script(v, resolver_vm.steps_gpa);
}

static void check_crossing(struct vcpu *v, int ret)
{
	uint64_t words[2] = { pattern_word(&resolver_vm.source.pattern, 0, 511),
			      pattern_word(&resolver_vm.source.pattern, 1, 0) },
		 word;
	uint32_t value;
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value) && value == 5, "%s", vcpu_describe(v, ret));
	memcpy(&word, (uint8_t *)words + 5, 8);
	EQUAL("what the guest read", resolver_vm.steps[0].value, word);
	memcpy(&word, resolver_vm.ram.hva + 3 * PAGE - 2, 8);
	EQUAL("what the guest wrote", word, 0x1122334455667788);
}

/* ---- a new handle ---- */

/* Every resolver call fails once, and after each failure the vCPU gets a new handle. */
static void left_by_errors(void)
{
	unsigned failures = 0;
	int ret;
	struct vcpu *v = set_up(-EIO);
	load_crossing(v);
	for (ret = go_on(v); ret == -EIO; ret = go_on(v), failures++) {
		EQUAL("exit reason in the middle", v->run->exit_reason, KVM_EXIT_MMIO);
		vcpu_detach(v);
		attach(v);
		answer = 0;
		/* Of what comes next the first is to fail again. */
		uint64_t page = (v->run->mmio.phys_addr - RAM_GPA) / PAGE;
		if (kvmfault_pages_state(resolver_vm.m.library, RAM_GPA + page * PAGE) == KVMFAULT_PAGE_ABSENT)
			resolver_vm_install(page);
		answer = -EIO;
	}
	EQUAL("failures", failures, 4);
	check_crossing(v, ret);
	tear_down(v);
}

static void after_errors(void)
{
	each_loop(left_by_errors);
}

static atomic_bool interrupted;

static void *leave_at_a_kick(struct vcpu *v)
{
	attach(v);
	load_crossing(v);
	int ret = go_on(v);
	CHECK(ret == KVMFAULT_INTERRUPTED, "%s", vcpu_describe(v, ret));
	EQUAL("exit reason in the middle", v->run->exit_reason, KVM_EXIT_MMIO);
	vcpu_detach(v);
	interrupted = true;
	return NULL;
}

static void left_by_a_kick(void)
{
	struct vcpu *v = set_up(KVMFAULT_PENDING);
	vcpu_detach(v);
	interrupted = false;
	vcpu_start(v, leave_at_a_kick, NULL);
	UNTIL(asked == 1);
	OK(kvmfault_vcpu_kick(v->handle));
	vcpu_join(v);
	answer = 0;
	resolver_vm_install(0);
	attach(v);
	check_crossing(v, go_on(v));
	EQUAL("exit reason is the last one's", v->run->exit_reason, KVM_EXIT_IO);
	tear_down(v);
}

/* A VMM that ends its vCPUs' threads to pause, and begins new ones. */
static void after_a_kick(void)
{
	loop = RUN;
	left_by_a_kick();
	loop = OWN_RESUMES;
	left_by_a_kick();
}

/* What is finished, and what is a device's, isn't done once more. */
static void finished(void)
{
	uint32_t value;
	for (loop = RUN; loop <= OWN_RESUMES; loop++) {
		struct vcpu *v = set_up(0);
		resolver_vm.steps[0] = (struct step){ READ64, NOWHERE_GPA, 0, 0 };
		resolver_vm.steps[1] = (struct step){ READ64, RAM_GPA, 0, 0 };
		resolver_vm.steps[2] = (struct step){ STOP, 0, 0, 0 };
		vcpu_load_script(v, resolver_vm.steps_gpa);
		int ret = go_on(v);
		CHECK(ret == KVMFAULT_PASS && v->run->exit_reason == KVM_EXIT_MMIO, "%s", vcpu_describe(v, ret));
		memset(v->run->mmio.data, 0x42, 8);
		vcpu_detach(v);
		attach(v);
		ret = go_on(v);
		CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
		EQUAL("what the device answered", resolver_vm.steps[0].value, 0x4242424242424242);
		EQUAL("what the guest read", resolver_vm.steps[1].value,
		      pattern_word(&resolver_vm.source.pattern, 0, 0));
		tear_down(v);
	}
}

/* ---- memory errors ---- */

static void expect_lost(struct vcpu *v, uint64_t page)
{
	struct kvmfault_memory_error_info info = KVMFAULT_MEMORY_ERROR_INFO_INIT;
	int ret = go_on(v);
	CHECK(ret == KVMFAULT_MEMORY_ERROR, "%s", vcpu_describe(v, ret));
	OK(kvmfault_vcpu_memory_error(v->handle, &info));
	EQUAL("gpa", info.gpa, RAM_GPA + page * PAGE);
	EQUAL("lost", info.lost, 1);
}

/* A lost page that comes back: the access that met it is repeated, whether it reads or writes. */
static void comes_back(void)
{
	struct vcpu *v = set_up(KVMFAULT_LOST);
	load_crossing(v);
	for (uint64_t page = 0; page < 4; page++) {
		expect_lost(v, page);
		OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA + page * PAGE, PAGE));
		if (page % 2) {
			vcpu_detach(v); /* that it is unfinished is known without the handle */
			attach(v);
		} else {
			/* the resolver was called anew, with the same answer */
			expect_lost(v, page);
			OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA + page * PAGE, PAGE));
		}
		resolver_vm_install(page);
	}
	check_crossing(v, go_on(v));
	tear_down(v);
}

static void lost_comes_back(void)
{
	each_loop(comes_back);
}

/*
 * A VMM that goes on though the page is still lost (it has injected a machine check) gets no second
 * error for the access, which is given up.
 */
static void given_up(void)
{
	uint32_t value;
	struct vcpu *v = set_up(KVMFAULT_LOST);
	resolver_vm_load_read(v, 0);
	expect_lost(v, 0);
	answer = 0;
	int ret = go_on(v);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	EQUAL("what the guest read", resolver_vm.steps[0].value, -1);
	/* Another access to the page is an error of its own. */
	resolver_vm_load_read(v, 0);
	expect_lost(v, 0);
	OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA, PAGE));
	ret = go_on(v);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	resolver_vm_check_read(v, 0);
	/* A write is dropped. */
	OK(kvmfault_pages_lost(resolver_vm.m.library, RAM_GPA + 9 * PAGE, PAGE));
	resolver_vm.steps[0] = (struct step){ WRITE64, RAM_GPA + 9 * PAGE, 1, 0 };
	vcpu_load_script(v, resolver_vm.steps_gpa);
	expect_lost(v, 9);
	ret = go_on(v);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(v, &value), "%s", vcpu_describe(v, ret));
	OK(kvmfault_pages_discard(resolver_vm.m.library, RAM_GPA + 9 * PAGE, PAGE));
	resolver_vm_read(v, 9);
	tear_down(v);
}

static void lost_given_up(void)
{
	each_loop(given_up);
}

/* ---- a slot that is deleted ---- */

static atomic_int deleted;

static int late_install(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque;
	asked++;
	UNTIL(deleted);
	int ret = kvmfault_pages_install(vm, fault->gpa, resolver_vm.m.low, fault->len);
	EQUAL("installing where no slot is", ret, -ENOENT);
	return ret;
}

static void *read_where_none_is(struct vcpu *v)
{
	attach(v);
	resolver_vm_load_read(v, 3);
	int ret = go_on(v);
	CHECK(ret == KVMFAULT_PASS && v->run->exit_reason == KVM_EXIT_MMIO, "%s", vcpu_describe(v, ret));
	EQUAL("the address", v->run->mmio.phys_addr, RAM_GPA + 3 * PAGE);
	vcpu_detach(v);
	return NULL;
}

/*
 * A fault whose slot is deleted meanwhile is no failure of its resolver: the guest finds that no
 * memory is there.
 */
static void slot_is_deleted(void)
{
	if (test_mechanism() == KVMFAULT_MECHANISM_USERFAULTFD)
		skip("the vCPU sleeps inside KVM_RUN, and deleting the slot waits for it");
	for (int cpl = 0; cpl <= 3; cpl += 3) {
		struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
		slot.slot = RAM_SLOT;
		asked = deleted = 0;
		loop = RUN;
		resolver_vm_set_up(MEMFD, late_install, 1, cpl);
		vcpu_start(resolver_vm.m.vcpu[0], read_where_none_is, NULL);
		UNTIL(asked == 1);
		OK(kvmfault_memslot_set(resolver_vm.m.library, &slot));
		deleted = 1;
		vcpu_join(resolver_vm.m.vcpu[0]);
		resolver_vm_tear_down();
	}
}

static const struct test_case cases[] = {
	{ "after-errors", after_errors, true },   { "after-a-kick", after_a_kick, true },
	{ "finished", finished, true },           { "lost-comes-back", lost_comes_back, true },
	{ "lost-given-up", lost_given_up, true }, { "slot-is-deleted", slot_is_deleted, true },
};
TEST_MAIN(cases)
