/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The guest that is migrated: every CPU goes over its share of memory again and again. In each pass
 * it checks that a page is exactly what the pass before has left there, and writes the next
 * content.
 *
 * Serial port, output:
 *   pass 12 ok cpus 12 13 tsc 81985529216486895 CPU 0 has finished a pass; passes of each CPU. Some
 *   ten lines a second at most WRONG address expected found for ever
 * Input, each answered by a line:
 *   r, s visit pages in random, sequential order, from the next pass on "order random" z forget the
 *   times measured so far "zeroed" h the times of the first accesses to pages since then "histogram
 *   BUCKET:COUNT ... end"
 *
 * Bucket b of the histogram holds times from (8 + b % 8) << (b / 8) >> 3 TSC ticks on: eight
 * buckets an octave.
 */
#include <stdint.h>

#define PAGE_SHIFT 12
/* Below lie the code, the page tables and the ROMs. */
#define FIRST_PAGE (0x200000 >> PAGE_SHIFT)
#define MAX_CPUS 8
#define BUCKETS 512

#define COM1 0x3f8
#define FW_CFG 0x510 /* QEMU's docs/specs/fw_cfg.rst: selector; data in the next port */
#define FW_CFG_RAM_SIZE 3
#define FW_CFG_NB_CPUS 5
#define LAPIC_ICR ((volatile uint32_t *)0xfee00300)

struct cpu {
	volatile uint32_t passes;
	uint32_t epoch; /* of the histogram */
	volatile uint32_t histogram[BUCKETS];
};

volatile uint32_t cpus_started;
static struct cpu cpus[MAX_CPUS];
static volatile uint32_t ready, number_of_cpus, number_of_pages;
static volatile uint32_t epoch;
static volatile uint32_t random_order;
/* The first wrong word; `wrong` is set last. */
static volatile uint64_t wrong_address, wrong_expected, wrong_found;
static volatile uint32_t wrong;

static inline void outb(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
static inline void outw(uint16_t port, uint16_t value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
static inline uint8_t inb(uint16_t port)
{
	uint8_t value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
	return value;
}
static inline void pause(void) { __asm__ volatile("pause" : : : "memory"); }
static inline uint64_t rdtsc(void)
{
	uint32_t low, high;
	__asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
	return (uint64_t)high << 32 | low;
}

/* ---- serial port ---- */
static void put(char c)
{
	while (!(inb(COM1 + 5) & 0x20))
		pause();
	outb(COM1, c);
}

static void text(const char *s)
{
	while (*s)
		put(*s++);
}

static void decimal(uint64_t value)
{
	char digits[20];
	int n = 0;
	do
		digits[n++] = '0' + value % 10;
	while (value /= 10);
	while (n)
		put(digits[--n]);
}

static void hex(uint64_t value)
{
	for (int shift = 60; shift >= 0; shift -= 4)
		put("0123456789abcdef"[value >> shift & 15]);
}

/* ---- histogram ---- */
static void note_time(struct cpu *cpu, uint64_t ticks)
{
	uint32_t octave = 63 - __builtin_clzll(ticks | 8);
	uint32_t eighth = ticks >> (octave - 3) & 7;
	if (cpu->epoch != epoch) {
		cpu->epoch = epoch;
		for (int b = 0; b < BUCKETS; b++)
			cpu->histogram[b] = 0;
	}
	cpu->histogram[ticks < 8 ? ticks : (octave << 3 | eighth)]++;
}

static void print_histogram(void)
{
	text("histogram");
	for (int b = 0; b < BUCKETS; b++) {
		uint64_t count = 0;
		for (uint32_t n = 0; n < number_of_cpus; n++)
			count += cpus[n].epoch == epoch ? cpus[n].histogram[b] : 0;
		if (count) {
			put(' ');
			decimal(b);
			put(':');
			decimal(count);
		}
	}
	text(" end\n");
}

/* ---- CPU 0 talks ---- */
static void print_pass(void)
{
	static uint64_t printed;
	if (rdtsc() - printed < 1 << 28)
		return;
	printed = rdtsc();
	text("pass ");
	decimal(cpus[0].passes);
	text(" ok cpus");
	for (uint32_t n = 0; n < number_of_cpus; n++) {
		put(' ');
		decimal(cpus[n].passes);
	}
	text(" tsc ");
	decimal(rdtsc());
	put('\n');
}

static void print_wrong(void)
{
	for (;;) {
		text("WRONG ");
		hex(wrong_address);
		put(' ');
		hex(wrong_expected);
		put(' ');
		hex(wrong_found);
		put('\n');
	}
}

static void listen(void)
{
	if (wrong)
		print_wrong();
	while (inb(COM1 + 5) & 1) {
		switch (inb(COM1)) {
		case 'r':
			random_order = 1;
			text("order random\n");
			break;
		case 's':
			random_order = 0;
			text("order sequential\n");
			break;
		case 'z':
			epoch++;
			text("zeroed\n");
			break;
		case 'h':
			print_histogram();
			break;
		}
	}
}

/* ---- memory ---- */
/* What pass `pass` leaves in word `n` of a page. */
static inline uint64_t content(uint32_t page, uint32_t pass, uint32_t n)
{
	return (((uint64_t)page << 32 | pass) + n) * 0x9e3779b97f4a7c15u;
}

/* Eight words of a page, one in each 512 bytes, at places that differ from page to page. */
static inline volatile uint64_t *word(uint32_t page, uint32_t n)
{
	return (volatile uint64_t *)((uintptr_t)page << PAGE_SHIFT) + n * 64 + ((page + n * 9) & 63);
}

/*
 * The first pass only writes: to read private memory first would get the host's zero page, and the
 * write after it a copy and an interrupt for each other CPU, which takes an emulated machine 100
 * ms.
 */
static void fill(uint32_t page)
{
	for (uint32_t n = 0; n < 8; n++)
		*word(page, n) = content(page, 1, n);
}

static void visit(struct cpu *cpu, uint32_t page, uint32_t pass)
{
	uint64_t before = rdtsc();
	(void)*word(page, 0);
	note_time(cpu, rdtsc() - before);
	for (uint32_t n = 0; n < 8; n++) {
		uint64_t expected = content(page, pass - 1, n), found = *word(page, n);
		if (found != expected && !wrong) {
			wrong_address = (uintptr_t)word(page, n);
			wrong_expected = expected;
			wrong_found = found;
			wrong = 1;
		}
		*word(page, n) = content(page, pass, n);
	}
}

/* A permutation of 0 .. mask, another one in each pass. */
static inline uint32_t shuffled(uint32_t i, uint32_t mask, uint32_t half, uint32_t pass)
{
	i = (i * 0x9e3779b1u + pass * 0x85ebca6bu) & mask;
	i ^= i >> half;
	i = i * 0xc2b2ae35u & mask;
	return i ^ i >> half;
}

__attribute__((noreturn)) void work(uint32_t n)
{
	struct cpu *cpu = &cpus[n];
	uint32_t share = number_of_pages / number_of_cpus, first = FIRST_PAGE + n * share;
	uint32_t bits = 1;
	uint64_t listened = 0;
	if (n == number_of_cpus - 1)
		share = FIRST_PAGE + number_of_pages - first;
	while (1u << bits < share)
		bits++;
	uint32_t mask = (1u << bits) - 1;

	for (uint32_t pass = 1;; pass++) {
		uint32_t shuffle = random_order;
		for (uint32_t i = 0; i <= mask; i++) {
			uint32_t page = shuffle ? shuffled(i, mask, bits / 2, pass) : i;
			if (page >= share)
				continue;
			if (pass == 1)
				fill(first + page);
			else
				visit(cpu, first + page, pass);
			/*
			 * Not at every page: it leaves the guest. Some milliseconds of any
			 * processor's TSC.
			 */
			if (n == 0 && rdtsc() - listened > 1 << 23) {
				listen();
				listened = rdtsc();
			}
		}
		cpu->passes = pass;
		if (n == 0)
			print_pass();
	}
}

/* ---- start ---- */
static uint64_t fw_cfg(uint16_t item, int bytes)
{
	uint64_t value = 0;
	outw(FW_CFG, item);
	for (int i = 0; i < bytes; i++)
		value |= (uint64_t)inb(FW_CFG + 1) << 8 * i;
	return value;
}

static void wait(uint32_t ticks)
{
	for (uint64_t start = rdtsc(); rdtsc() - start < ticks;)
		pause();
}

/* Runs in ring 0; the CPU's number is in the order of coming. */
uint32_t set_up(uint32_t n)
{
	if (n == 0) {
		uint64_t size = fw_cfg(FW_CFG_RAM_SIZE, 8);
		/* More than that is not below the hole for devices. */
		number_of_pages = (size > 0x80000000u ? 0x80000000u : size) / 4096 - FIRST_PAGE;
		number_of_cpus = fw_cfg(FW_CFG_NB_CPUS, 2);
		if (number_of_cpus > MAX_CPUS)
			number_of_cpus = MAX_CPUS;
		outb(COM1 + 1, 0); /* no interrupts */
		outb(COM1 + 3, 3); /* eight bits */
		outb(COM1 + 2, 1); /* FIFOs */
		if (number_of_cpus > 1) {
			*LAPIC_ICR = 0xc4500; /* INIT to all others */
			wait(1 << 25);
			*LAPIC_ICR = 0xc4608; /* SIPI, page 8 */
		}
		while (cpus_started < number_of_cpus)
			pause();
		text("memory ");
		decimal(number_of_pages);
		text(" pages, ");
		decimal(number_of_cpus);
		text(" cpus\n");
		ready = 1;
	}
	while (!ready || n >= MAX_CPUS)
		pause();
	return n;
}
