/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pages from a server: a resolver that sends a request over a socket to another process and returns
 * KVMFAULT_PENDING, and a thread that installs what comes back. Each page is waited for, one at a
 * time for each vCPU. `userfaultfd` and `poison-trap` take turns, and ratios are those within a
 * turn. `socket` is the same traffic without a VM: nothing can be faster.
 */
#define _GNU_SOURCE
#include "ways.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ROUNDS = 7, PAGES = 8192, MOST = 8 };

struct answer {
	uint64_t gpa;
	uint8_t bytes[PAGE];
};

/* The server, and our end of the socket. It lives for one run. */
static int connection;
static pid_t server;

static bool receive_all(int fd, void *bytes, size_t len)
{
	return recv(fd, bytes, len, MSG_WAITALL) == (ssize_t)len;
}

static void start_server(void)
{
	int ends[2];
	SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
	server = (pid_t)SYS(fork());
	if (server == 0) {
		struct answer answer;
		close(ends[0]);
		memset(answer.bytes, 0xa5, sizeof(answer.bytes));
		while (receive_all(ends[1], &answer.gpa, sizeof(answer.gpa)))
			if (send(ends[1], &answer, sizeof(answer), MSG_NOSIGNAL) != sizeof(answer))
				break;
		_exit(0);
	}
	close(ends[1]);
	connection = ends[0];
}

static void end_server(void)
{
	close(connection);
	SYS(waitpid(server, NULL, 0));
}

static int ask(void *opaque, struct kvmfault_vm *vm, const struct kvmfault_fault *fault)
{
	(void)opaque, (void)vm;
	/* (A request of 8 bytes isn't cut on a local socket.) */
	return send(connection, &fault->gpa, sizeof(fault->gpa), MSG_NOSIGNAL) == sizeof(fault->gpa) ? KVMFAULT_PENDING
												     : -errno;
}

static void *install(void *arg)
{
	struct kvmfault_vm *vm = arg;
	struct answer answer;
	while (receive_all(connection, &answer, sizeof(answer)))
		OK(kvmfault_pages_install(vm, answer.gpa, answer.bytes, PAGE));
	return NULL;
}

static pthread_barrier_t begin;

static void *run(struct vcpu *v)
{
	vcpu_attach(v);
	pthread_barrier_wait(&begin);
	vcpu_run(v);
	vcpu_detach(v);
	return NULL;
}

/* Pages a second. */
static double with_vm(int mechanism, unsigned vcpus)
{
	struct kvmfault_vm_options options = KVMFAULT_VM_OPTIONS_INIT;
	struct machine m;
	struct ram ram;
	pthread_t receiver;
	uint64_t list_gpa, ticks_gpa;
	start_server();
	ram_create(&ram, MEMFD, PAGES * PAGE);
	machine_create(&m, 2 * (PAGES * sizeof(uint32_t) + PAGE));
	uint32_t *list = machine_share(&m, PAGES * sizeof(uint32_t), &list_gpa);
	machine_share(&m, PAGES * sizeof(uint32_t), &ticks_gpa);
	list_sequential(list, PAGES);
	list_shuffle(list, PAGES, 42);
	options.mechanism = mechanism;
	options.resolver = ask;
	machine_attach(&m, NULL, &options);
	machine_set_slot(&m, &ram, RAM_SLOT, RAM_GPA);
	CHECK(!pthread_create(&receiver, NULL, install, m.library), "pthread_create");
	pthread_barrier_init(&begin, NULL, vcpus + 1);
	for (unsigned i = 0; i < vcpus; i++) {
		uint64_t first = PAGES * i / vcpus, end = PAGES * (i + 1) / vcpus;
		struct vcpu *v = machine_add_vcpu(&m, 3);
		vcpu_load_walk(v, RAM_GPA, list_gpa + first * 4, end - first, ticks_gpa + first * 4);
		vcpu_start(v, run, NULL);
	}
	pthread_barrier_wait(&begin);
	double start = now();
	for (unsigned i = 0; i < vcpus; i++)
		vcpu_join(m.vcpu[i]);
	double seconds = now() - start;
	pthread_barrier_destroy(&begin);
	shutdown(connection, SHUT_RDWR);
	pthread_join(receiver, NULL);
	machine_destroy(&m);
	ram_destroy(&ram);
	end_server();
	return PAGES / seconds;
}

/* The same traffic: as many requests are under way as there would be vCPUs. */
static double without_vm(unsigned vcpus)
{
	struct answer answer;
	uint64_t asked = 0;
	start_server();
	double start = now();
	for (uint64_t came = 0; came < PAGES; came++) {
		for (; asked < PAGES && asked < came + vcpus; asked++)
			CHECK(send(connection, &asked, sizeof(asked), MSG_NOSIGNAL) == sizeof(asked), "send: %s",
			      strerror(errno));
		CHECK(receive_all(connection, &answer, sizeof(answer)), "recv: %s", strerror(errno));
	}
	double seconds = now() - start;
	end_server();
	return PAGES / seconds;
}

static int compare_numbers(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

static void write_spread(FILE *json, const char *name, double *numbers)
{
	qsort(numbers, ROUNDS, sizeof(*numbers), compare_numbers);
	fprintf(json, ", \"%s\": {\"min\": %.3f, \"median\": %.3f, \"max\": %.3f}", name, numbers[0],
		numbers[ROUNDS / 2], numbers[ROUNDS - 1]);
}

int main(int argc, char **argv)
{
	static const unsigned counts[] = { 1, 2, MOST };
	struct kvmfault_probe probe = KVMFAULT_PROBE_INIT;
	if (argc != 1 && (argc != 3 || strcmp(argv[1], "--json"))) {
		fprintf(stderr, "usage: pending [--json FILE]\n");
		return 2;
	}
	OK(kvmfault_probe(-1, &probe));
	if (!(probe.mechanisms_shared & 1u << KVMFAULT_MECHANISM_POISON_TRAP))
		skip("poison-trap doesn't work here (Linux 6.6)");
	FILE *json = fopen(argc == 3 ? argv[2] : "/dev/null", "w");
	CHECK(json, "%s: %s", argv[2], strerror(errno));
	for (size_t c = 0; c < sizeof(counts) / sizeof(*counts); c++) {
		double uffd[ROUNDS], trap[ROUNDS], ratio[ROUNDS], alone[ROUNDS];
		for (int r = 0; r < ROUNDS; r++) {
			uffd[r] = with_vm(KVMFAULT_MECHANISM_USERFAULTFD, counts[c]);
			trap[r] = with_vm(KVMFAULT_MECHANISM_POISON_TRAP, counts[c]);
			alone[r] = without_vm(counts[c]);
			ratio[r] = trap[r] / uffd[r];
		}
		fprintf(json, "%s\n {\"vcpus\": %u, \"pages\": %d, \"rounds\": %d", c ? "," : "[", counts[c], PAGES,
			ROUNDS);
		write_spread(json, "userfaultfd", uffd);
		write_spread(json, "poison-trap", trap);
		write_spread(json, "socket", alone);
		write_spread(json, "ratio", ratio);
		fprintf(json, "}");
		printf("pages from a server, %u vCPU%s: userfaultfd %.1f, poison-trap %.1f thousand pages/s: %.2f "
		       "times (%.2f to %.2f); the socket alone %.1f\n",
		       counts[c], counts[c] == 1 ? "" : "s", uffd[ROUNDS / 2] / 1000, trap[ROUNDS / 2] / 1000,
		       ratio[ROUNDS / 2], ratio[0], ratio[ROUNDS - 1], alone[ROUNDS / 2] / 1000);
		fflush(stdout);
	}
	fprintf(json, "\n]\n");
	fclose(json);
	return 0;
}
