/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kvmfault-runner: runs the cases of test programs, each in a process group of its own and not
 * longer than a given time, and prints a line for each:
 *
 *   PASS group/case seconds [what it measured]
 *   FAIL group/case seconds reason
 *   SKIP group/case seconds reason
 *   N passed, N failed, N skipped
 *
 * The output of cases that fail follows their line, indented. A program that can't list its cases
 * is a failed case.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SKIPPED = 77, MOST = 1024, KEPT = 256 << 10 };

static double timeout = 120;
static const char *filters[MOST], *skips[MOST];
static size_t filter_count, skip_count;
static const char *programs[MOST];
static size_t program_count;
static unsigned passed, failed, skipped;

/* What became of a child. */
struct outcome {
	char *output; /* its stdout and stderr, the last KEPT bytes */
	int status;   /* as of waitpid */
	bool timed_out;
	double seconds;
};

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static void keep(struct outcome *o, size_t *length, const char *bytes, size_t count)
{
	if (*length + count > KEPT) {
		size_t drop = *length + count - KEPT;
		memmove(o->output, o->output + drop, *length - drop);
		*length -= drop;
	}
	memcpy(o->output + *length, bytes, count);
	*length += count;
	o->output[*length] = 0;
}

/* Runs `program argument` and whatever it starts, until it ends or its time is over. */
static void run(const char *program, const char *argument, double limit, struct outcome *o)
{
	int out[2];
	double start = now();
	*o = (struct outcome){ .output = calloc(1, KEPT + 1) };
	if (!o->output || pipe2(out, O_CLOEXEC)) {
		perror("kvmfault-runner");
		exit(2);
	}
	fflush(stdout);
	pid_t child = fork();
	if (child < 0) {
		perror("kvmfault-runner: fork");
		exit(2);
	}
	if (child == 0) {
		int null = open("/dev/null", O_RDONLY);
		prctl(PR_SET_PDEATHSIG, SIGKILL); /* Ctrl-C reaches us, and not another group */
		setpgid(0, 0);
		dup2(null, 0);
		dup2(out[1], 1);
		dup2(out[1], 2);
		execl(program, program, argument, (char *)NULL);
		fprintf(stderr, "%s: %s\n", program, strerror(errno));
		_exit(126);
	}
	setpgid(child, child); /* whichever of us is first */
	close(out[1]);

	bool ended = false, open_end = true;
	size_t length = 0;
	double deadline = start + limit;
	while (!ended || open_end) {
		struct pollfd p = { .fd = open_end ? out[0] : -1, .events = POLLIN };
		char bytes[4096];
		/*
		 * The end of the output usually comes with the child's end, so this rarely waits
		 * for its time.
		 */
		if (poll(&p, 1, open_end ? 20 : 1) > 0) {
			ssize_t got = read(out[0], bytes, sizeof(bytes));
			if (got > 0)
				keep(o, &length, bytes, got);
			else
				open_end = false;
		}
		if (!ended && waitpid(child, &o->status, WNOHANG) == child) {
			ended = true;
			o->seconds = now() - start;
			/*
			 * Ends what the child left behind, which may hold the other end of the
			 * pipe.
			 */
			kill(-child, SIGKILL);
			deadline = now() + 5;
		}
		if (now() > deadline) {
			if (ended)
				break; /* a process outside the group holds the pipe */
			o->timed_out = true;
			kill(-child, SIGKILL);
			deadline = now() + 30; /* the kernel may never end the child */
			if (o->seconds)
				break;
			o->seconds = now() - start;
		}
	}
	close(out[0]);
}

/* The last line that begins with `prefix`, or that isn't empty; into `line`, without its end. */
static bool last_line(const char *output, const char *prefix, char *line, size_t size)
{
	bool found = false;
	for (const char *at = output; *at; at += strcspn(at, "\n"), at += *at == '\n') {
		size_t length = strcspn(at, "\n");
		if (length && !strncmp(at, prefix, strlen(prefix))) {
			snprintf(line, size, "%.*s", (int)(length - strlen(prefix)), at + strlen(prefix));
			found = true;
		}
	}
	return found;
}

static void why_it_failed(const struct outcome *o, char *reason, size_t size)
{
	char line[1024];
	if (o->timed_out)
		snprintf(reason, size, "timeout: killed after %.0f s", o->seconds);
	else if (last_line(o->output, "FAIL: ", line, sizeof(line)))
		snprintf(reason, size, "%s", line);
	else if (WIFSIGNALED(o->status))
		snprintf(reason, size, "killed by signal %d (%s)", WTERMSIG(o->status), strsignal(WTERMSIG(o->status)));
	else if (WEXITSTATUS(o->status) == SKIPPED)
		snprintf(reason, size, "skipped without a reason");
	else if (last_line(o->output, "", line, sizeof(line)))
		snprintf(reason, size, "exit status %d: %s", WEXITSTATUS(o->status), line);
	else
		snprintf(reason, size, "exit status %d without a word", WEXITSTATUS(o->status));
}

static void print_failure(const char *group, const char *name, const struct outcome *o)
{
	char reason[1200];
	why_it_failed(o, reason, sizeof(reason));
	printf("FAIL %s/%s %.2f %s\n", group, name, o->seconds, reason);
	for (const char *at = o->output; *at; at += strcspn(at, "\n"), at += *at == '\n')
		printf("    | %.*s\n", (int)strcspn(at, "\n"), at);
	failed++;
}

static void run_case(const char *program, const char *group, const char *name)
{
	struct outcome o;
	char line[1024];
	run(program, name, timeout, &o);
	if (!o.timed_out && WIFEXITED(o.status) && WEXITSTATUS(o.status) == 0) {
		bool noted = last_line(o.output, "NOTE: ", line, sizeof(line));
		printf("PASS %s/%s %.2f%s%s\n", group, name, o.seconds, noted ? " " : "", noted ? line : "");
		passed++;
	} else if (!o.timed_out && WIFEXITED(o.status) && WEXITSTATUS(o.status) == SKIPPED &&
		   last_line(o.output, "SKIP: ", line, sizeof(line))) {
		printf("SKIP %s/%s %.2f %s\n", group, name, o.seconds, line);
		skipped++;
	} else {
		print_failure(group, name, &o);
	}
	fflush(stdout);
	free(o.output);
}

/* All parts of a filter, which are joined by '+', are in the name. */
static bool matches(const char *name, const char *filter)
{
	char part[256];
	for (const char *at = filter;; at++) {
		size_t length = strcspn(at, "+");
		snprintf(part, sizeof(part), "%.*s", (int)length, at);
		if (!strstr(name, part))
			return false;
		at += length;
		if (!*at)
			return true;
	}
}

static bool is_wanted(const char *group, const char *name)
{
	char full[1024];
	snprintf(full, sizeof(full), "%s/%s", group, name);
	for (size_t i = 0; i < skip_count; i++)
		if (matches(full, skips[i]))
			return false;
	for (size_t i = 0; i < filter_count; i++)
		if (matches(full, filters[i]))
			return true;
	return filter_count == 0;
}

static void run_program(const char *program, bool list)
{
	const char *slash = strrchr(program, '/');
	const char *group = slash ? slash + 1 : program;
	struct outcome o;
	run(program, "--list", timeout, &o);
	if (o.timed_out || !WIFEXITED(o.status) || WEXITSTATUS(o.status) || !*o.output) {
		print_failure(group, "list", &o);
		free(o.output);
		return;
	}
	for (char *save, *name = strtok_r(o.output, "\n", &save); name; name = strtok_r(NULL, "\n", &save)) {
		if (!is_wanted(group, name))
			continue;
		if (list)
			printf("%s/%s\n", group, name);
		else
			run_case(program, group, name);
	}
	free(o.output);
}

static bool is_program(const char *path)
{
	struct stat s;
	return !stat(path, &s) && S_ISREG(s.st_mode) && !access(path, X_OK);
}

static int by_name(const void *a, const void *b)
{
	return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* All programs beside this one; shared libraries are none. */
static void find_programs(void)
{
	char self[PATH_MAX], path[PATH_MAX];
	ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);
	if (length < 0)
		return;
	self[length] = 0;
	*strrchr(self, '/') = 0;
	DIR *directory = opendir(self);
	for (struct dirent *e; directory && (e = readdir(directory));) {
		bool other = strstr(e->d_name, ".so") || !strcmp(e->d_name, "kvmfault-runner");
		if (!other && snprintf(path, sizeof(path), "%s/%s", self, e->d_name) < (int)sizeof(path) &&
		    is_program(path) && program_count < MOST)
			programs[program_count++] = strdup(path);
	}
	if (directory)
		closedir(directory);
	qsort(programs, program_count, sizeof(*programs), by_name);
}

static void usage(FILE *to)
{
	fprintf(to, "usage: kvmfault-runner [OPTION]... [PROGRAM | FILTER]...\n"
		    "Runs the cases of test programs: those that are named, or all in its own directory.\n"
		    "  --filter SUBSTRING  only cases with SUBSTRING in group/case; A+B: with both; a word that is no "
		    "program is a filter, too\n"
		    "  --without SUBSTRING no cases with SUBSTRING in group/case; A+B as above\n"
		    "  --timeout SECONDS   for each case (default 120)\n"
		    "  --list              print their names, and run nothing\n"
		    "Exit status: 0 if none failed, 1 if one did, 2 for wrong use or if there is nothing to run.\n");
}

int main(int argc, char **argv)
{
	static const struct option known[] = {
		{ "filter", required_argument, NULL, 'f' },  { "without", required_argument, NULL, 'w' },
		{ "timeout", required_argument, NULL, 't' }, { "list", no_argument, NULL, 'l' },
		{ "help", no_argument, NULL, 'h' },          { 0 },
	};
	bool list = false;
	for (int c; (c = getopt_long(argc, argv, "", known, NULL)) != -1;) {
		switch (c) {
		case 'f':
			if (filter_count < MOST)
				filters[filter_count++] = optarg;
			break;
		case 'w':
			if (skip_count < MOST)
				skips[skip_count++] = optarg;
			break;
		case 't':
			timeout = strtod(optarg, NULL);
			if (timeout > 0)
				break;
			fprintf(stderr, "kvmfault-runner: --timeout takes seconds, not \"%s\"\n", optarg);
			return 2;
		case 'l':
			list = true;
			break;
		default:
			usage(c == 'h' ? stdout : stderr);
			return c == 'h' ? 0 : 2;
		}
	}
	for (; optind < argc && program_count < MOST && filter_count < MOST; optind++) {
		if (is_program(argv[optind]))
			programs[program_count++] = argv[optind];
		else if (strchr(argv[optind], '/') && !access(argv[optind], F_OK))
			return fprintf(stderr, "kvmfault-runner: %s can't be run\n", argv[optind]), 2;
		else
			filters[filter_count++] = argv[optind];
	}
	if (!program_count)
		find_programs();
	for (size_t i = 0; i < program_count; i++)
		run_program(programs[i], list);
	if (list)
		return 0;
	printf("%u passed, %u failed, %u skipped\n", passed, failed, skipped);
	return failed ? 1 : passed + skipped ? 0 : 2;
}
