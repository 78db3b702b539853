/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "output.h"
#include "tiny-vm.h"

#include <errno.h>
#include <stdarg.h>
#include <unistd.h>

bool progress_is_shown(void)
{
	return isatty(STDOUT_FILENO) && isatty(STDERR_FILENO);
}

void progress_show(const char *format, ...)
{
	va_list args;
	if (!progress_is_shown())
		return;
	fputs("\r\033[K", stderr); /* to the start of the line, and clear it */
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
}

void progress_clear(void)
{
	progress_show("%s", "");
}

void write_json_list(const char *path, const void *results, size_t count,
		     void (*write)(FILE *file, const void *results, size_t n))
{
	FILE *file = fopen(path, "w");
	if (!file)
		die(errno, "%s", path);
	for (size_t n = 0; n < count; n++) {
		fputs(n ? ",\n  " : "[\n  ", file);
		write(file, results, n);
	}
	fputs("\n]\n", file);
	if (fclose(file))
		die(errno, "%s", path);
}
