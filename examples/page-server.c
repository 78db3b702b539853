/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Post-copy with recovery: a VM runs at once, and its memory comes over a socket from a page
 * server in another process. At 40 % that server is killed; another one takes its place, and the
 * guest continues. The guest checks every page. Meanwhile a thread of the VMM reads guest memory,
 * as a device would.
 *
 *   cc page-server.c page-source.c page-stream.c options.c output.c clock.c vcpu-threads.c \
 *      tiny-vm.c guest.c guest.S $(pkg-config --cflags --libs kvmfault) -pthread -o page-server
 *
 * Start with page-source.c, the VMM's end of the socket: it uses the library in another way than
 * lazy-restore.c does.
 */
#define _GNU_SOURCE
#include "clock.h"
#include "guest.h"
#include "options.h"
#include "output.h"
#include "page-source.h"
#include "page-stream.h"
#include "tiny-vm.h"
#include "vcpu-threads.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { RAM_SLOT = 1, MOST_VCPUS = 64 };

struct options {
	const char *mechanism; /* a name, or "all" */
	unsigned vcpus;
	uint64_t size;
	unsigned kill_at; /* percent; 0: never */
	bool push;
	int cpl; /* 0, 3, or -1 for both */
	const char *json;
};

struct result {
	const char *mechanism;
	int cpl;
	uint64_t pages, asked, connections, withdrawn, host_reads;
	double seconds, gap_ms;
	bool verified;
};

/* ---- the process of the server ---- */

static char server_path[] = "/tmp/page-server-XXXXXX/socket";

static pid_t start_server(uint64_t die_after)
{
	extern char **environ;
	char number[32];
	pid_t pid;
	snprintf(number, sizeof(number), "%llu", (unsigned long long)die_after);
	char *arguments[] = { "page-server", "--serve", server_path, "--die-after", number, NULL };
	int error = posix_spawn(&pid, "/proc/self/exe", NULL, NULL, arguments, environ);
	if (error)
		die(error, "starting the page server");
	return pid;
}

static void end_server(pid_t pid)
{
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

static void remove_socket(void)
{
	unlink(server_path);
	*strrchr(server_path, '/') = 0;
	rmdir(server_path);
}

/* ---- a device, as far as memory is concerned ---- */

struct device {
	const uint8_t *ram;
	uint64_t pages;
	atomic_uint *running;
	pthread_t thread;
	uint64_t reads;
	bool right;
};

/*
 * An ordinary access through the VMM's mapping. Where the page is absent it waits in the kernel,
 * until the page is installed.
 */
static void *read_memory(void *arg)
{
	struct device *d = arg;
	d->right = true;
	for (uint64_t page = 1; *d->running > 0; page = (page * 5 + 3) % d->pages, d->reads++) {
		uint64_t w = d->reads % GUEST_PAGE_WORDS;
		d->right &= ((volatile uint64_t *)(d->ram + page * PAGE_SIZE))[w] == guest_word(page, w);
		usleep(1000);
	}
	return NULL;
}

/* ---- one migration ---- */

/* Shows the progress, and replaces a server that has died, until all vCPUs have finished. */
static void watch(const struct kvmfault_vm *memory, uint64_t pages, const atomic_uint *running, pid_t *server)
{
	const char *news = "";
	for (unsigned i = 0; *running > 0; usleep(1000)) {
		if (i % 50 == 0) {
			uint64_t present = pages - kvmfault_pages_absent(memory);
			progress_show("%3d %% of %llu pages%s", (int)(present * 100 / pages), (unsigned long long)pages,
				      news);
		}
		i++;
		if (waitpid(*server, NULL, WNOHANG) == *server) {
			usleep(100000); /* the time that an operator needs */
			*server = start_server(0);
			news = ", after the first server died";
		}
	}
	progress_clear();
}

static void migrate(const struct options *o, const struct mechanism *mechanism, int cpl, struct result *result)
{
	uint64_t pages = o->size / PAGE_SIZE;
	struct vcpu_threads vcpus;
	vcpu_threads_create(&vcpus, o->vcpus, pages, 1);

	struct page_source source = { .path = server_path, .gpa = TINY_VM_RAM, .pages = pages, .push = o->push };
	page_source_init(&source);
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct kvmfault_vm *memory;
	options.kvm_fd = vcpus.vm.kvm;
	options.vm_fd = vcpus.vm.vm;
	options.mechanism = mechanism->number; /* most programs use KVMFAULT_MECHANISM_AUTO */
	options.resolver = page_source_resolve;
	options.opaque = &source;
	if (kvmfault_vm_new(&options, &memory))
		die(0, "%s: %s", mechanism->name, kvmfault_last_error());

	struct kvmfault_memslot slot = KVMFAULT_MEMSLOT_INIT;
	slot.slot = RAM_SLOT;
	slot.gpa = TINY_VM_RAM;
	slot.len = o->size;
	uint8_t *ram = slot.hva = mmap(NULL, o->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (ram == MAP_FAILED)
		die(errno, "%lu MiB of guest memory", (unsigned long)(o->size >> 20));
	if (kvmfault_memslot_set(memory, &slot))
		die(0, "%s: %s", mechanism->name, kvmfault_last_error());

	pid_t server = start_server(pages * o->kill_at / 100);
	double began = seconds_now();
	page_source_start(&source, memory);

	vcpu_threads_prepare(&vcpus, cpl, memory, false);
	vcpu_threads_start(&vcpus);
	struct device device = { .ram = ram, .pages = pages, .running = &vcpus.running };
	int error = pthread_create(&device.thread, NULL, read_memory, &device);
	if (error)
		die(error, "a thread for the device");

	watch(memory, pages, &vcpus.running, &server);
	result->verified = vcpu_threads_join(&vcpus);
	pthread_join(device.thread, NULL);
	result->seconds = seconds_now() - began;
	result->verified &= device.right && guest_memory_is_right(ram, pages, false);
	result->mechanism = mechanism->name;
	result->cpl = cpl;
	result->pages = pages;
	result->asked = source.asked;
	result->connections = source.connections;
	result->withdrawn = source.withdrawn;
	result->gap_ms = source.gap * 1000;
	result->host_reads = device.reads;

	/*
	 * Nothing touches the memory any more. Stop what uses the VM first; then delete the
	 * memslot, then the VM, then what its resolver needs.
	 */
	page_source_stop(&source);
	end_server(server);
	slot.len = 0;
	if (kvmfault_memslot_set(memory, &slot))
		die(0, "deleting the slot: %s", kvmfault_last_error());
	if (kvmfault_vm_close(memory, -1)) /* waits until no resolver call uses `source` */
		die(0, "closing the VM: %s", kvmfault_last_error());
	vcpu_threads_destroy(&vcpus);
	munmap(ram, o->size);
}

/* ---- the command line ---- */

static void usage(FILE *to)
{
	fprintf(to,
		"usage: page-server [OPTION]...\n"
		"Runs a VM whose memory comes over a socket from a page server in another process. That server is\n"
		"killed on the way and replaced; the guest checks every page.\n"
		"  --mechanism NAME|all    memslot-flag, poison-trap, userfaultfd, or all that work here (default)\n"
		"  --vcpus N               1 to %d (default 4)\n"
		"  --size MIB              guest memory, 1 to %lu (default 64)\n"
		"  --kill PERCENT          kill the server when it has sent this share, 0 to 99; 0: never\n"
		"                          (default 40)\n"
		"  --push yes|no           the server sends pages without a request, too (default yes)\n"
		"  --cpl 0|3|both          the guest's privilege level (default both)\n"
		"  --json FILE             write the results there too\n"
		"  --serve SOCKET          be the page server, until the process that started this one ends\n"
		"  --die-after PAGES       with --serve: die after this number of pages\n"
		"The table: pages that were requested, connections, pages that were announced and withdrawn, the\n"
		"longest time without a server in milliseconds (100 ms of it are a pause before the new one is\n"
		"started), and how often the VMM itself read guest memory.\n"
		"Exit status: 0 if every page was right, 1 if not or if something failed, 2 for a wrong option.\n",
		MOST_VCPUS, TINY_VM_RAM_MAX >> 20);
}

static void parse_options(int argc, char **argv, struct options *o)
{
	static const struct option known[] = {
		{ "mechanism", required_argument, NULL, 'm' },
		{ "vcpus", required_argument, NULL, 'v' },
		{ "size", required_argument, NULL, 's' },
		{ "kill", required_argument, NULL, 'k' },
		{ "push", required_argument, NULL, 'p' },
		{ "cpl", required_argument, NULL, 'c' },
		{ "json", required_argument, NULL, 'j' },
		{ "serve", required_argument, NULL, 'S' },
		{ "die-after", required_argument, NULL, 'D' },
		{ "help", no_argument, NULL, 'h' },
		{ 0 },
	};
	const char *serve = NULL;
	uint64_t die_after = 0;
	*o = (struct options){
		.mechanism = "all", .vcpus = 4, .size = 64ul << 20, .kill_at = 40, .push = true, .cpl = -1
	};
	for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
		switch (c) {
		case 'm':
			option_choice("mechanism", optarg, "memslot-flag|poison-trap|userfaultfd|all");
			o->mechanism = optarg;
			break;
		case 'v':
			o->vcpus = option_number("vcpus", optarg, 1, MOST_VCPUS);
			break;
		case 's':
			o->size = option_number("size", optarg, 1, TINY_VM_RAM_MAX >> 20) << 20;
			break;
		case 'k':
			o->kill_at = option_number("kill", optarg, 0, 99);
			break;
		case 'p':
			o->push = option_choice("push", optarg, "yes|no") == 0;
			break;
		case 'c':
			o->cpl = option_cpl(optarg);
			break;
		case 'j':
			o->json = optarg;
			break;
		case 'S':
			serve = optarg;
			break;
		case 'D':
			die_after = option_number("die-after", optarg, 0, UINT64_MAX);
			break;
		default:
			usage(c == 'h' ? stdout : stderr);
			exit(c == 'h' ? 0 : 2);
		}
	}
	if (optind < argc) {
		usage(stderr);
		exit(2);
	}
	if (serve)
		page_serve(serve, die_after);
}

static void print_result(const struct result *r)
{
	printf("%-13s %3d %7llu %8.3f %8.0f %7llu %11llu %9llu %6.1f %10llu %s\n", r->mechanism, r->cpl,
	       (unsigned long long)r->pages, r->seconds, r->pages / r->seconds, (unsigned long long)r->asked,
	       (unsigned long long)r->connections, (unsigned long long)r->withdrawn, r->gap_ms,
	       (unsigned long long)r->host_reads, r->verified ? "yes" : "NO");
	fflush(stdout);
}

static void write_result(FILE *file, const void *results, size_t n)
{
	const struct result *r = (const struct result *)results + n;
	fprintf(file,
		"{\"mechanism\": \"%s\", \"cpl\": %d, \"pages\": %llu, \"seconds\": %.6f, "
		"\"pages_per_second\": %.0f, \"asked\": %llu, "
		"\"connections\": %llu, \"withdrawn\": %llu, \"gap_ms\": %.2f, \"host_reads\": %llu, \"verified\": %s}",
		r->mechanism, r->cpl, (unsigned long long)r->pages, r->seconds, r->pages / r->seconds,
		(unsigned long long)r->asked, (unsigned long long)r->connections, (unsigned long long)r->withdrawn,
		r->gap_ms, (unsigned long long)r->host_reads, r->verified ? "true" : "false");
}

int main(int argc, char **argv)
{
	struct options o;
	parse_options(argc, argv, &o);

	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	if (kvmfault_probe(-1, &probe))
		die(0, "page-server: %s", kvmfault_last_error());
	/*
	 * A directory that only this user may enter: a process that connects can read the guest's
	 * memory.
	 */
	*strrchr(server_path, '/') = 0;
	if (!mkdtemp(server_path))
		die(errno, "%s", server_path);
	server_path[strlen(server_path)] = '/';
	atexit(remove_socket);

	struct result results[MECHANISMS * 2];
	size_t count = 0;
	bool all_right = true;
	printf("%u vCPUs, %llu MiB\n\n", o.vcpus, (unsigned long long)(o.size >> 20));
	printf("%-13s %3s %7s %8s %8s %7s %11s %9s %6s %10s %s\n", "mechanism", "cpl", "pages", "seconds", "pages/s",
	       "asked", "connections", "withdrawn", "gap ms", "host reads", "verified");
	fflush(stdout);
	for (int m = 0; m < MECHANISMS; m++) {
		if (!mechanism_is_wanted(&mechanisms[m], o.mechanism, &probe))
			continue;
		for (int cpl = 3; cpl >= 0; cpl -= 3) {
			if (o.cpl != -1 && o.cpl != cpl)
				continue;
			struct result *r = &results[count++];
			migrate(&o, &mechanisms[m], cpl, r);
			print_result(r);
			all_right &= r->verified;
		}
	}
	if (!count)
		die(0, "page-server: no mechanism works here; `explain` says why");
	if (o.json)
		write_json_list(o.json, results, count, write_result);
	return all_right ? 0 : 1;
}
