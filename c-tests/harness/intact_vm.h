/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * For the bad_*.c groups, each of which gives the library something wrong: the call must fail with the right errno and a message that
 * names the argument, and afterwards nothing may have changed. A `subject` is a VM in good order that is looked at after each try.
 */
#ifndef INTACT_VM_H
#define INTACT_VM_H

#include "machine.h"

enum { INTACT_VM_PAGES = 1024 };
#define INTACT_VM_GPA RAM_GPA
#define INTACT_VM_LEN (INTACT_VM_PAGES * PAGE)

struct intact_vm {
	struct machine machine;
	struct ram ram; /* memfd, in slot RAM_SLOT at INTACT_VM_GPA */
	struct source source;
	struct vcpu *vcpu; /* attached */
	struct step *script;
	uint64_t script_gpa;
	uint8_t state[INTACT_VM_PAGES]; /* what the library said last */
	uint64_t next;                /* the first page that the guest has not read */
};

/* Some pages are present, some lost, the others absent; the vCPU belongs to the calling thread. */
void intact_vm_create(struct intact_vm *subject);
/* The same with options of the case's own: resolver, opaque, readers and so on. */
void intact_vm_create_with(struct intact_vm *subject, const struct kvmfault_vm_options *options);
void intact_vm_destroy(struct intact_vm *subject);

/* Nothing has changed since the last look: slot, page states, number of absent pages. And all still works: the guest reads
 * another absent page, which comes with one resolver call, and with the right bytes. */
void intact_vm_check(struct intact_vm *subject);
/* The states were changed on purpose: take them as they are. */
void intact_vm_learn(struct intact_vm *subject);
/* The guest reads page `page`; returns what vcpu_run of the library returns. */
int intact_vm_read(struct intact_vm *subject, uint64_t page);

/*
 * What a call said to an output structure of `size` bytes, of which the library knows `known`: false if it refused a size that ends inside a
 * field (bad_input has a list of which those are). Any other error ends the case.
 */
bool size_accepted(int ret, size_t size, size_t known);

/* A descriptor's number that is closed. */
int closed_fd(void);
/* A userfaultfd; skips the case where none can be had. */
int new_uffd(void);
/* A fresh mapping of `len` bytes, memfd or anonymous; not part of any slot. */
uint8_t *map_memfd(uint64_t len);
uint8_t *map_anon(uint64_t len);

#endif
