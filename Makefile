# SPDX-License-Identifier: MIT OR Apache-2.0
#
# `make help` lists the targets. GNU make; each target sets up what it needs (scripts/setup).

PREFIX = /usr/local
LIBDIR = $(PREFIX)/lib
INCLUDEDIR = $(PREFIX)/include
DESTDIR =
# For another architecture: make TARGET=aarch64-unknown-linux-gnu [stage|install|cross-check].
# All of it is then in target/TARGET.
TARGET =
CROSS := $(filter-out $(shell uname -m)-%,$(TARGET))
TOOLS = $(CROSS:%-unknown-linux-gnu=%-linux-gnu-)
CC = $(if $(CROSS),$(TOOLS)gcc,cc)
CXX = $(if $(CROSS),$(TOOLS)g++,c++)
CFLAGS = -O2 -g
CXXFLAGS = $(CFLAGS)

export PATH := $(PATH):$(HOME)/.cargo/bin
export CARGO_TARGET_DIR := $(CURDIR)/target
unexport CARGO_BUILD_TARGET
export CC CXX

# The version has one home, Cargo.toml; the SONAME follows from it here.
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml)
SONAME := libkvmfault.so.$(firstword $(subst ., ,$(VERSION)))

T = target$(TARGET:%=/%)
CARGO_TARGET = $(TARGET:%=--target %)
ARCHIVE = $T/release/libkvmfault.a
STATIC_LIBS = $T/release/native-static-libs
SHARED = $T/release/libkvmfault.so.$(VERSION)
STAGE = $T/stage
PROGRAMS = $T/programs
VM_PROGRAMS = $T/programs-static
BENCH = $T/bench/sweep $T/bench/background $T/bench/pending $T/bench/instructions
PKG_CONFIG = PKG_CONFIG_PATH=$(STAGE)/lib/pkgconfig pkg-config

ifneq ($(CROSS),)
# Where cargo, the crate cc and bindgen look for the tools. Debian keeps the headers of each
# architecture that it has cross compilers for in a folder of its own.
CROSS_NAME := $(subst -,_,$(CROSS))
export CARGO_TARGET_$(shell echo $(CROSS_NAME) | tr a-z A-Z)_LINKER = $(CC)
export CC_$(CROSS_NAME) = $(CC)
export HOST_CC = cc
export BINDGEN_EXTRA_CLANG_ARGS_$(CROSS_NAME) = -isystem /usr/$(TOOLS:%-=%)/include
CANNOT_CROSS := $(filter-out build stage install cross-check header help clean target/%,$(MAKECMDGOALS))
ifneq ($(CANNOT_CROSS),)
$(error with TARGET=$(TARGET) only build, stage, install and cross-check can be made, not $(CANNOT_CROSS))
endif
endif

.DEFAULT_GOAL = build
.DELETE_ON_ERROR:
.SUFFIXES:
.SECONDARY:
.PHONY: FORCE

.PHONY: help
help: ## this list
	@echo 'make TARGET [NAME=VALUE]...'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do printf 'make %-11s %s\n' "$$target" "$$text"; done

.PHONY: build
build: $(SHARED) ## the library (default)

.PHONY: demo
# Writes target/demo.json.
demo: examples ## what lazy restore saves and costs on this machine [DEMO_OPTIONS=--help]
	$T/examples/lazy-restore --json $T/demo.json $(DEMO_OPTIONS)

.PHONY: demo-server
demo-server: examples ## as demo, from a page server that is killed and replaced on the way
	$T/examples/page-server

.PHONY: test
test: vm-programs programs examples | setup-test ## everything that can be tested here
	@scripts/test all

.PHONY: test-fast
test-fast: programs | setup-test ## the loop while you write: Rust tests, and C tests of each part
	@scripts/test rust fast

.PHONY: test-vm
test-vm: vm-programs ## C tests on other kernels, in emulated machines [KERNEL= ABI= FILTER=]
	c-tests/vm/tier --programs $(VM_PROGRAMS)

.PHONY: test-qemu
# In emulated machines; writes target/qemu.json.
test-qemu: stage ## patched QEMU in post-copy [KERNEL= MECHANISM= CASE= ROUNDS= SMP=]
	qemu/tier $(KERNEL:%=--kernel %) $(MECHANISM:%=--mechanism %) $(SMP:%=--smp %) -- $(CASE:%=--case %) $(ROUNDS:%=--rounds %)

.PHONY: bench
# Writes CSV, JSON and a plot to target/bench/.
bench: $(BENCH) | setup-bench ## pages a second and latencies beside plain C [BENCH_OPTIONS=]
	$T/bench/sweep --json $T/bench/summary.json --csv $T/bench/summary.csv $(BENCH_OPTIONS)
	$T/bench/sweep --batch 16 --order sequential --memory anon --vcpus 1,8 --json $T/bench/summary-16.json
	bench/report $T/bench/summary.json $T/bench/summary-16.json --plot $T/bench/summary.svg
	$T/bench/background --json $T/bench/background.json
	$T/bench/pending --json $T/bench/pending.json
	bench/callgrind $T/bench/instructions --json $T/bench/instructions.json
	cargo bench --locked --quiet --features internals --bench scaling -- --json $(CURDIR)/$T/bench/scaling.json
	bench/model $T/bench/scaling.json --json $T/bench/model.json

.PHONY: check
check: stage | setup-check ## formatting, spelling, lints, rooms, header and exported symbols
	scripts/check

.PHONY: cross-check
cross-check: setup-build ## compiles the library and its Rust tests for TARGET, without linking them
	cargo check --locked --quiet --lib --tests $(CARGO_TARGET)

.PHONY: header
header: setup-build ## writes include/kvmfault.h from src/capi
	KVMFAULT_WRITE_HEADER=1 cargo test --locked --quiet --test header

.PHONY: clean
clean: ## removes target/ (with the caches of the kernels)
	rm -rf $T

.PHONY: setup-build setup-test setup-bench setup-check
setup-build:
	@scripts/setup build
ifneq ($(CROSS),)
	@scripts/setup $(CROSS:aarch64-unknown-linux-gnu=arm64)
endif
setup-test: setup-build
	@scripts/setup test
setup-bench: setup-build
	@scripts/setup bench
setup-check: setup-build
	@scripts/setup check

# ---- the library -------------------------------------------------------------------------------

# cargo knows what is out of date. rustc's own shared library would have no symbol versions: the
# linker makes ours.
$(ARCHIVE): FORCE | setup-build
	cargo rustc --release --locked --lib --crate-type staticlib $(CARGO_TARGET) -- --print native-static-libs=$(STATIC_LIBS)

$(SHARED): $(ARCHIVE) src/capi/kvmfault.map Makefile
	$(CC) -shared -o $@ -Wl,-soname,$(SONAME) \
		-Wl,--version-script=src/capi/kvmfault.map,--no-undefined-version \
		-Wl,--whole-archive $(ARCHIVE) -Wl,--no-whole-archive $$(cat $(STATIC_LIBS)) \
		-Wl,--gc-sections,--as-needed,-z,defs,-z,relro,-z,now $(LDFLAGS)

.PHONY: install
install: $(SHARED) ## installs to $(DESTDIR)$(PREFIX) [LIBDIR= INCLUDEDIR=]
	install -d "$(DESTDIR)$(LIBDIR)/pkgconfig" "$(DESTDIR)$(INCLUDEDIR)"
	install -C -m 644 include/kvmfault.h "$(DESTDIR)$(INCLUDEDIR)/"
	install -C -m 644 $(ARCHIVE) "$(DESTDIR)$(LIBDIR)/"
	install -C -m 755 $(SHARED) "$(DESTDIR)$(LIBDIR)/"
	ln -sf libkvmfault.so.$(VERSION) "$(DESTDIR)$(LIBDIR)/$(SONAME)"
	ln -sf $(SONAME) "$(DESTDIR)$(LIBDIR)/libkvmfault.so"
	@# Each compiler driver adds its own libgcc; naming the shared one would forbid -static.
	sed -e 's|@PREFIX@|$(PREFIX)|; s|@LIBDIR@|$(LIBDIR:$(PREFIX)/%=$${prefix}/%)|; s|@INCLUDEDIR@|$(INCLUDEDIR:$(PREFIX)/%=$${prefix}/%)|' \
		-e "s|@VERSION@|$(VERSION)|; s|@STATIC_LIBS@|$$(sed 's/-lgcc_s *//' $(STATIC_LIBS))|" \
		pkgconfig/kvmfault.pc.in >"$(DESTDIR)$(LIBDIR)/pkgconfig/kvmfault.pc"
	[ -n "$(DESTDIR)$(CROSS)" ] || [ "$$(id -u)" != 0 ] || ldconfig

# ---- C programs, all built against an installed tree -------------------------------------------

.PHONY: stage
stage: $(SHARED)
	@$(MAKE) --no-print-directory -s -o $(ARCHIVE) install DESTDIR= PREFIX=$(CURDIR)/$(STAGE) \
		LIBDIR=$(CURDIR)/$(STAGE)/lib INCLUDEDIR=$(CURDIR)/$(STAGE)/include
# Programs are rebuilt when an installed file has changed, not whenever it was installed.
INSTALLED = $(STAGE)/include/kvmfault.h $(STAGE)/lib/libkvmfault.so.$(VERSION)
$(INSTALLED): stage ;

C_FLAGS = -std=gnu11 -Wall -Wextra -Werror -pthread $(CFLAGS) -MMD -MP
C_LIBS = $$($(PKG_CONFIG) --libs kvmfault) -Wl,-rpath,'$$ORIGIN' -pthread $(LDFLAGS)

# A C file with a header of its own name is part of every program of its folder, and so is guest
# code (.S). The other C files are programs.
programs_in = $(filter-out $(patsubst %.h,%.c,$(wildcard $1/*.h)),$(wildcard $1/*.c))
parts_of = $(patsubst %,$T/objects/%.o,$(wildcard $(patsubst %.h,%.c,$(wildcard $1/*.h))) $(wildcard $1/*.S $1/guest/*.S))
EXAMPLES = $(patsubst %.c,$T/%,$(call programs_in,examples))
# c-tests/README.md says what is in which folder. The parts in harness/ are parts of all programs.
NO_TESTS = $(addprefix c-tests/,harness/% header/% kernel/% vm/%) $(patsubst %.h,%.c,$(wildcard c-tests/*/*.h))
TEST_SOURCES = $(filter-out $(NO_TESTS),$(wildcard c-tests/*/*.c))
TESTS = $(patsubst %.c,$(PROGRAMS)/%,$(notdir $(TEST_SOURCES)))
TEST_PARTS = $(call parts_of,c-tests/harness)

.PHONY: examples programs vm-programs
examples: $(EXAMPLES) $T/examples/restore $T/examples/$(SONAME)
programs: $(TESTS) $(PROGRAMS)/$(SONAME) $(PROGRAMS)/kvmfault-runner
# An emulated machine is slow to load and to link: its programs are static. The library's Rust tests
# are among them (c-tests/vm/rust).
vm-programs: $(TESTS:$(PROGRAMS)/%=$(VM_PROGRAMS)/%) $(VM_PROGRAMS)/kvmfault-runner $(VM_PROGRAMS)/rust $(VM_PROGRAMS)/rust.d/tests

$T/objects/%.c.o: %.c $(INSTALLED) Makefile
	@mkdir -p $(@D)
	$(CC) $(C_FLAGS) $$($(PKG_CONFIG) --cflags kvmfault) -I$(<D) $(INCLUDES) -c -o $@ $<
$T/objects/c-tests/%: INCLUDES = -Ic-tests/harness
$T/objects/%.S.o: %.S Makefile
	@mkdir -p $(@D)
	$(CC) -MMD -MP -I$(<D) -c -o $@ $<

# The Rust example. cargo knows what is out of date.
$T/examples/restore: FORCE | setup-build
	@mkdir -p $(@D)
	cargo build --locked --quiet --example restore
	install -C -m 755 $T/debug/examples/restore $@
$(EXAMPLES): $T/examples/%: $T/objects/examples/%.c.o $(call parts_of,examples)
	@mkdir -p $(@D)
	$(CC) -o $@ $^ $(C_LIBS)
define test_program
$(PROGRAMS)/$(notdir $(1:.c=)) $(VM_PROGRAMS)/$(notdir $(1:.c=)): $T/objects/$1.o $(call parts_of,$(patsubst %/,%,$(dir $1)))

endef
$(eval $(foreach source,$(TEST_SOURCES),$(call test_program,$(source))))
$(TESTS): $(PROGRAMS)/%: $(TEST_PARTS)
	@mkdir -p $(@D)
	$(CC) -o $@ $^ $(C_LIBS)
# bench/ has parts of its own besides those of the tests.
BENCH_PARTS = $(patsubst %.c,$T/objects/%.c.o,bench/ways.c bench/plain.c bench/trap.c)
$(BENCH): $T/bench/%: $T/objects/bench/%.c.o $(BENCH_PARTS) $(TEST_PARTS) $T/bench/$(SONAME)
	@mkdir -p $(@D)
	$(CC) -o $@ $(filter %.o,$^) $(C_LIBS) -lm
$(TESTS:$(PROGRAMS)/%=$(VM_PROGRAMS)/%): $(VM_PROGRAMS)/%: $(TEST_PARTS) $(SHARED)
	@mkdir -p $(@D)
	$(CC) -static -o $@ $(filter %.o,$^) $$($(PKG_CONFIG) --static --libs kvmfault) -pthread $(LDFLAGS)
$(PROGRAMS)/kvmfault-runner $(VM_PROGRAMS)/kvmfault-runner: $T/objects/c-tests/harness/runner.c.o
	@mkdir -p $(@D)
	$(CC) -o $@ $^ -pthread $(LDFLAGS)
$(VM_PROGRAMS)/rust: c-tests/vm/rust
	@mkdir -p $(@D)
	install -m 755 $< $@
$(VM_PROGRAMS)/rust.d/tests: FORCE | setup-build
	@mkdir -p $(@D)
	cargo test --locked --quiet --lib --no-run --message-format=json-render-diagnostics >$T/rust-tests.json
	strip -g -o $@ "$$(sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' $T/rust-tests.json)"
%/$(SONAME): $(INSTALLED)
	@mkdir -p $(@D)
	install -C -m 755 $(STAGE)/lib/$(SONAME) $@

-include $(shell find $T/objects -name '*.d' 2>/dev/null)
