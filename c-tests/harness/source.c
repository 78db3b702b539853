/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "source.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static bool is_zero(const struct pattern *p, uint64_t page)
{
	return p->zero_mask && (page & p->zero_mask) == p->zero_mask;
}

uint64_t pattern_word(const struct pattern *p, uint64_t page, unsigned word)
{
	return is_zero(p, page) ? 0 : (page + 1) * p->factor + word;
}

void pattern_fill(const struct pattern *p, uint64_t page, void *to)
{
	uint64_t *words = to;
	for (unsigned w = 0; w < PAGE / 8; w++)
		words[w] = pattern_word(p, page, w);
}

void pattern_check(const struct pattern *p, const void *memory, uint64_t first, uint64_t count)
{
	const uint64_t *words = memory;
	for (uint64_t page = first; page < first + count; page++)
		for (unsigned w = 0; w < PAGE / 8; w++, words++)
			CHECK(*words == pattern_word(p, page, w), "page %#lx word %u is %#lx, not %#lx", page, w,
			      *words, pattern_word(p, page, w));
}

void source_create(struct source *s, uint64_t gpa, uint64_t len, struct pattern pattern)
{
	memset(s, 0, sizeof(*s));
	s->pattern = pattern;
	s->gpa = gpa;
	s->pages = len / PAGE;
	s->calls = calloc(s->pages, sizeof(*s->calls));
	CHECK(s->calls, "no memory");
}

void source_destroy(struct source *s)
{
	free((void *)s->calls);
}

atomic_uint vms_going;

int source_install(const struct source *s, struct kvmfault_vm *vm, uint64_t gpa, uint64_t len)
{
	static _Thread_local uint8_t page[PAGE] __attribute__((aligned(PAGE)));
	uint8_t *bytes = page;
	if (len > PAGE) {
		bytes = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(bytes != MAP_FAILED, "mmap: %s", strerror(errno));
	}
	for (uint64_t at = 0; at < len; at += PAGE)
		pattern_fill(&s->pattern, (gpa - s->gpa + at) / PAGE, bytes + at);
	int ret = kvmfault_pages_install(vm, gpa, bytes, len);
	if (len > PAGE)
		munmap(bytes, len);
	return (ret == -EBADF || ret == -ESHUTDOWN) && vms_going ? 0 : ret;
}

int source_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct source *s = opaque;
	CHECK(fault->gpa >= s->gpa && fault->gpa + fault->len <= s->gpa + s->pages * PAGE &&
		      fault->gpa % fault->len == 0,
	      "the resolver is asked for [%#lx, +%#lx)", fault->gpa, fault->len);
	s->calls[(fault->gpa - s->gpa) / PAGE]++;
	s->total++;
	*(fault->origin == KVMFAULT_ORIGIN_VCPU   ? &s->vcpu
	  : fault->origin == KVMFAULT_ORIGIN_HOST ? &s->host
						  : &s->prefetch) += 1;
	int ret = s->window ? source_install(s, vm, fault->window_gpa, fault->window_len)
			    : source_install(s, vm, fault->gpa, fault->len);
	/*
	 * With windows another vCPU may have been first: the library is to take that from a
	 * resolver.
	 */
	if (!(s->window && ret == -EEXIST))
		OK(ret);
	return ret;
}

static void *later_main(void *arg)
{
	struct later *l = arg;
	uint64_t seed = 5;
	pthread_mutex_lock(&l->lock);
	for (;;) {
		while (l->head == l->tail && !l->stop)
			pthread_cond_wait(&l->news, &l->lock);
		if (l->head == l->tail)
			break;
		uint64_t gpa = l->queue[l->head++ % 4096];
		pthread_mutex_unlock(&l->lock);
		if (l->most_us)
			usleep(random_number(&seed) % l->most_us);
		OK(source_install(l->source, l->vm, gpa, PAGE));
		pthread_mutex_lock(&l->lock);
	}
	pthread_mutex_unlock(&l->lock);
	return NULL;
}

void later_create(struct later *l, struct source *source, unsigned every, unsigned most_us)
{
	memset(l, 0, sizeof(*l));
	l->source = source;
	l->every = every;
	l->most_us = most_us;
	pthread_mutex_init(&l->lock, NULL);
	pthread_cond_init(&l->news, NULL);
	CHECK(!pthread_create(&l->thread, NULL, later_main, l), "pthread_create");
}

void later_stop(struct later *l)
{
	pthread_mutex_lock(&l->lock);
	l->stop = true;
	pthread_cond_broadcast(&l->news);
	pthread_mutex_unlock(&l->lock);
	pthread_join(l->thread, NULL);
}

int later_resolve(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	struct later *l = opaque;
	uint64_t page = (fault->gpa - l->source->gpa) / PAGE;
	if (page % l->every)
		return source_resolve(l->source, vm, fault);
	l->source->calls[page]++;
	l->source->total++;
	pthread_mutex_lock(&l->lock);
	CHECK(l->tail - l->head < 4096, "too many pages are pending");
	l->vm = vm;
	l->queue[l->tail++ % 4096] = fault->gpa;
	pthread_cond_signal(&l->news);
	pthread_mutex_unlock(&l->lock);
	return KVMFAULT_PENDING;
}
