/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A VM in good order, for the bad_* groups: each gives the library something wrong. The call must
 * fail with the right errno and a message that names the argument; afterwards intact_vm_check finds
 * the VM unchanged and working.
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
	uint8_t state[INTACT_VM_PAGES]; /* the states that the library reported last */
	uint64_t next;                  /* the first page that the guest has not read */
};

/* Some pages are present, some lost, the others absent; the vCPU belongs to the calling thread. */
void intact_vm_create(struct intact_vm *vm);
/* intact_vm_create with options of the case's own: resolver, opaque, readers and so on. */
void intact_vm_create_with(struct intact_vm *vm, const struct kvmfault_vm_options *options);
void intact_vm_destroy(struct intact_vm *vm);

/*
 * Checks that nothing has changed since the last check (slot, page states, number of absent pages),
 * and that all still works: the guest reads another absent page, which comes with one resolver call
 * and with the right bytes.
 */
void intact_vm_check(struct intact_vm *vm);
/* Takes the states as they are now, after the case has changed them on purpose. */
void intact_vm_learn(struct intact_vm *vm);
/* The guest reads page `page`; returns what vcpu_run of the library returns. */
int intact_vm_read(struct intact_vm *vm, uint64_t page);

/*
 * The result of a call with an output structure of `size` bytes, of which the library knows
 * `known`: false if it refused a size that ends inside a field (bad_input lists those sizes). Any
 * other error ends the case.
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
