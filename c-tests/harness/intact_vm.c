/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "intact_vm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PRESENT_PAGES = 2, LOST_PAGE = 3, FIRST_ABSENT = 4 };

void intact_vm_create(struct intact_vm *s)
{
	intact_vm_create_with(s, NULL);
}

void intact_vm_create_with(struct intact_vm *s, const struct kvmfault_vm_options *options)
{
	memset(s, 0, sizeof(*s));
	machine_create(&s->machine, 4 * PAGE);
	ram_create(&s->ram, MEMFD, INTACT_VM_LEN);
	source_create(&s->source, INTACT_VM_GPA, INTACT_VM_LEN, PATTERN);
	machine_attach(&s->machine, &s->source, options);
	machine_set_slot(&s->machine, &s->ram, RAM_SLOT, INTACT_VM_GPA);
	s->script = machine_share(&s->machine, PAGE, &s->script_gpa);
	s->vcpu = machine_add_vcpu(&s->machine, 3);
	vcpu_attach(s->vcpu);

	OK(source_install(&s->source, s->machine.library, INTACT_VM_GPA, PRESENT_PAGES * PAGE));
	OK(kvmfault_pages_lost(s->machine.library, INTACT_VM_GPA + LOST_PAGE * PAGE, PAGE));
	s->next = FIRST_ABSENT;
	intact_vm_learn(s);
}

void intact_vm_destroy(struct intact_vm *s)
{
	machine_destroy(&s->machine);
	ram_destroy(&s->ram);
	source_destroy(&s->source);
}

/*
 * A thread that waits in userfaultfd goes on as soon as the page is there; the reader thread counts
 * the page after that.
 */
static int settled_state(const struct intact_vm *s, uint64_t page)
{
	int state;
	double end = now() + 5;
	while ((state = OK(kvmfault_pages_state(s->machine.library, INTACT_VM_GPA + page * PAGE))) ==
		       KVMFAULT_PAGE_RESOLVING &&
	       now() < end)
		usleep(100);
	return state;
}

void intact_vm_learn(struct intact_vm *s)
{
	for (uint64_t page = 0; page < INTACT_VM_PAGES; page++)
		s->state[page] = settled_state(s, page);
}

int intact_vm_read(struct intact_vm *s, uint64_t page)
{
	s->script[0] = (struct step){ .operation = READ64, .address = INTACT_VM_GPA + page * PAGE };
	s->script[1] = (struct step){ .operation = STOP };
	vcpu_load_script(s->vcpu, s->script_gpa);
	return kvmfault_vcpu_run(s->vcpu->handle);
}

static void expect_states(const struct intact_vm *s)
{
	uint64_t absent = 0;
	for (uint64_t page = 0; page < INTACT_VM_PAGES; page++) {
		int state = OK(kvmfault_pages_state(s->machine.library, INTACT_VM_GPA + page * PAGE));
		CHECK(state == s->state[page], "page %lu: its state was %d and is %d now", page, s->state[page], state);
		absent += state == KVMFAULT_PAGE_ABSENT || state == KVMFAULT_PAGE_RESOLVING;
	}
	EQUAL("absent pages", OK(kvmfault_pages_absent(s->machine.library)), absent);
}

void intact_vm_check(struct intact_vm *s)
{
	uint32_t value;
	uint64_t page = s->next++;

	expect_states(s);
	CHECK(page < INTACT_VM_PAGES && s->state[page] == KVMFAULT_PAGE_ABSENT, "page %lu isn't absent", page);
	int ret = intact_vm_read(s, page);
	CHECK(ret == KVMFAULT_PASS && vcpu_stopped(s->vcpu, &value), "%s", vcpu_describe(s->vcpu, ret));
	EQUAL("what the guest read", s->script[0].value, pattern_word(&s->source.pattern, page, 0));
	EQUAL("calls of the resolver for the page", s->source.calls[page], 1);
	EQUAL("the page's state", settled_state(s, page), KVMFAULT_PAGE_PRESENT);
	s->state[page] = KVMFAULT_PAGE_PRESENT;
	expect_states(s);
}

bool size_accepted(int ret, size_t size, size_t known)
{
	if (ret == 0)
		return true;
	CHECK(ret == -EINVAL && size < known && strstr(kvmfault_last_error(), "size"), "with size %zu: %s (%s)", size,
	      strerror(-ret), kvmfault_last_error());
	return false;
}

int closed_fd(void)
{
	int fd = SYS(open("/dev/null", O_RDONLY | O_CLOEXEC));
	int high = SYS(fcntl(fd, F_DUPFD_CLOEXEC, 500)); /* a number that nothing takes meanwhile */
	close(high);
	close(fd);
	return high;
}

int new_uffd(void)
{
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		skip("userfaultfd(2): %s", strerror(errno));
	return fd;
}

uint8_t *map_memfd(uint64_t len)
{
	int fd = SYS(memfd_create("bad", MFD_CLOEXEC));
	SYS(ftruncate(fd, len));
	void *memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(memory != MAP_FAILED, "mmap: %s", strerror(errno));
	close(fd);
	return memory;
}

uint8_t *map_anon(uint64_t len)
{
	void *memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(memory != MAP_FAILED, "mmap: %s", strerror(errno));
	madvise(memory, len, MADV_NOHUGEPAGE);
	return memory;
}
