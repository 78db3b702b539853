# SPDX-License-Identifier: MIT OR Apache-2.0
"""The whole matrix: the test programs on every kernel, and on the patched one in every ABI."""

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from . import cache, cases, command, kernels, machine, selftest
from .cache import Broken, Unavailable

PROGRAMS = "/opt/kvmfault"  # where --programs is in the guest
RUNNER = "kvmfault-runner"
ROW_KEYS = ("kernel", "abi", "mechanism", "group", "passed", "failed", "skipped", "reason")

EPILOG = """
environment (all optional; several values are separated by blanks or commas):
  KERNEL   stock-6.1, stock-6.12, newest, or a kernel release; default: all three, stock and patched
  ABI      kvm.fault_abi values; only the patched kernel is booted then, unless KERNEL asks for more; `stock` = unpatched
  FILTER   handed to the runner, as its argument and in FILTER
  KVMFAULT_SELFTEST_STRICT  asks for more than "no slower" beside the kernel's selftest:
                            2x memslot-flag, 1.4x poison-trap
  KVMFAULT_SELFTEST_ROUNDS  how often they take turns (default: 3)
  KVMFAULT_TEST_SCALE   shortens what tests repeat very often (default: 0.01)

exit status: 0 all passed; 1 something failed; 77 nothing could be run here (the reason is on stderr)
"""


def matrix(environment):
    """[(kernel name, abi or None)] in the order of running."""
    def words(name):
        return environment.get(name, "").replace(",", " ").split()
    names, abis = words("KERNEL"), words("ABI")
    for abi in abis:
        if abi not in command.ABIS + ("stock",):
            raise ValueError(f"ABI={abi}: not one of {', '.join(command.ABIS)}, stock")
    if abis and not names:
        names = [kernels.PATCHED]
    pairs = []
    for name in names or kernels.SERIES:
        if not abis or "stock" in abis:
            pairs.append((name, None))
        if name == kernels.PATCHED:
            # An explicit KERNEL without ABI is that kernel as it is.
            wanted = abis if abis else [] if words("KERNEL") else command.ABIS
            pairs += [(name, abi) for abi in wanted if abi != "stock"]
    return pairs


# What is run where, unless FILTER says otherwise. The stock kernels run everything; the patched
# ones, which differ in the flag only, what the flag has to do with: all groups with the two ABIs
# that are least alike, and with the others what goes by way of an exit or a memslot. In the order
# of how long that takes.
EVERY_ABI = ("flag/", "toggle/")
BY_ABI = ("dirty_log", "guests", "mmio", "own_loop", "prefault", "present", "race", "read_only", "restore",
          "slots", "slots_in_use", "taken_away")
FILTERS = {
    **dict.fromkeys(("v7", "userfault"), (*EVERY_ABI, "memslot-flag")),
    **dict.fromkeys(("v2", "v3", "v4"), (*EVERY_ABI, *(f"{group}/+memslot-flag" for group in BY_ABI))),
    **dict.fromkeys(("none", "falsefriend"), ("flag/",)),
}

# A machine of its own for the comparison with the kernel's selftest, with an emulated CPU on each
# of the host's: in single-threaded emulation userfaultfd's reader and its vCPU can't run at the
# same time, and neither would be seen as it is. There QEMU 7.2 loses to the kernel's own code
# patching about one boot in ten (see machine.py); such a boot is done again.
SELFTEST = "kernel_selftest"
SELFTEST_ABI = "v7"
SELFTEST_TRIES = 5
SELFTEST_FAILED = "the selftest failed"  # as kernel_selftest.c says it

# Longer than any one case may take (the runner ends it before): a machine that is merely slow says
# something meanwhile.
SILENCE = 330


def scale():
    """How much of what is repeated very often is run in an emulated machine.

    It is some forty times slower than the host.
    """
    return os.environ.get("KVMFAULT_TEST_SCALE", "0.01")


def passed_on(with_selftest):
    """What the environment says to the comparison."""
    found = {"KVMFAULT_SELFTEST_ROUNDS": "3"} if with_selftest else {}
    names = ("KVMFAULT_SELFTEST_ROUNDS", "KVMFAULT_SELFTEST_STRICT")
    found.update((key, value) for key, value in os.environ.items() if key in names)
    return [f"{key}={value}" for key, value in found.items()]


def boot(name, abi, options, reader):
    """One machine; returns a reason why the run as a whole failed, or None."""
    kernel = kernels.find(name)
    filters = options.filter.split() or FILTERS.get(abi, ())
    copies = command.copies(options.copy)
    if options.selftest:
        # The selftest's rate falls to a twentieth at times; a few rounds, and time for them.
        filters = ["--timeout", "280", f"{SELFTEST}/anon"]
        copies.append((selftest.set_up_and_build(), f"{PROGRAMS}/demand_paging_test"))
    words = ["env", f"FILTER={options.filter}", f"PATH={PROGRAMS}:{PROGRAMS}/bin:/bin:/sbin", f"KVMFAULT_VM_KERNEL={name}",
             f"KVMFAULT_VM_ABI={abi or ''}", f"KVMFAULT_TEST_SCALE={scale()}", *passed_on(options.selftest),
             RUNNER, *options.runner_arguments, *filters]
    outcome = command.run(kernel, words, [(options.programs, PROGRAMS), *copies], abi=abi, module_directory=options.modules,
                          hugepages=options.hugepages, smp=options.smp, memory=options.memory,
                          timeout=options.timeout, silence=SILENCE, output=reader.feed)
    reader.close()
    if outcome.problem:
        return f"{outcome.problem}; log: {outcome.log}"
    contradiction = reader.contradiction()
    if contradiction:
        return f"{contradiction}, its status was {outcome.status}; log: {outcome.log}"
    if outcome.status and not reader.totals[1]:
        return f"the runner's status was {outcome.status} though no case failed; log: {outcome.log}"
    return None


def not_the_librarys(problem, failed):
    """What happened that is not the library's fault, or None. `failed`: why cases failed.

    With more than one thread the guest kernel's own troubles (a stray int3, a stalled CPU) are the
    emulator's fault. The kernel's selftest, which does not use the library, failed once in some 50
    runs of the tier (its guest crashed), and never in 1300 runs of the selftest alone.
    """
    if os.environ.get("KVMFAULT_VM_TCG_THREAD") != "multi":
        return None
    if problem:
        return problem if "guest kernel" in problem else None
    return failed[0] if failed and all(SELFTEST_FAILED in reason for reason in failed) else None


def rows(name, abi, reader, problem):
    """The entries of vm.json for one machine."""
    groups = collections.OrderedDict()
    for case in reader.cases:
        groups.setdefault((case.mechanism, case.group), []).append(case)
    found = []
    for (mechanism, group), members in groups.items():
        # Why cases failed or were skipped; if none was, what they measured.
        reasons = dict.fromkeys(f"{c.name}: {c.reason}" for c in members if c.result != "PASS") or dict.fromkeys(
            f"{c.name}: {c.reason}" for c in members if c.reason)
        found.append(dict(zip(ROW_KEYS, (
            name, abi, mechanism, group, *(sum(c.result == r for c in members) for r in ("PASS", "FAIL", "SKIP")),
            "; ".join(reasons) or None))))
    if problem:
        # The machine itself is a case: a guest kernel that warned fails the tier even if all its
        # cases passed.
        found.append(dict(zip(ROW_KEYS, (name, abi, None, "machine", 0, 1, 0, problem))))
    return found


def write_json(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text("[\n" + ",\n".join(json.dumps(e) for e in entries) + "\n]\n")
    os.replace(new, path)


def table(entries):
    def total(selected, key):
        return sum(e[key] for e in selected)
    print(f"\n{'kernel':12} {'abi':12} {'mechanism':14} {'passed':>6} {'failed':>6} {'skipped':>7}")
    lines = collections.OrderedDict()
    for e in entries:
        lines.setdefault((e["kernel"], e["abi"] or "-", e["mechanism"] or "-"), []).append(e)
    for key, selected in lines.items():
        print("%-12s %-12s %-14s %6d %6d %7d" % (*key, *(total(selected, k) for k in ("passed", "failed", "skipped"))))
    print()
    for e in entries:
        if e["reason"] and (e["failed"] or e["skipped"]):
            where = "/".join(filter(None, (e["kernel"], e["abi"], e["mechanism"], e["group"])))
            print(f"{'FAIL' if e['failed'] else 'SKIP'} {where}: {e['reason']}")
    for e in entries:
        if e["group"] == SELFTEST and e["passed"] and e["reason"] and not e["skipped"]:
            print(f"NOTE {e['kernel']}/{e['abi']}: {e['reason']}")
    print("%d passed, %d failed, %d skipped" % tuple(total(entries, k) for k in ("passed", "failed", "skipped")))


def main():
    p = argparse.ArgumentParser(prog="tier", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
                                description="Runs the installed test programs on every kernel; writes target/vm.json.")
    p.add_argument("--programs", required=True, type=pathlib.Path, metavar="DIR",
                   help=f"holds {RUNNER} (or bin/{RUNNER}), the case programs and libkvmfault.so.0")
    p.add_argument("--copy", action="append", default=[], metavar="FILE[:DEST]", help="more for the guests, as in vm-run")
    p.add_argument("--json", type=pathlib.Path, default=cache.PROJECT / "target/vm.json", metavar="FILE")
    p.add_argument("--modules", metavar="DIR", help="a KVM that is broken on purpose, see c-tests/kernel/mutations")
    p.add_argument("--timeout", type=float, default=1800, metavar="S",
                   help=f"for each machine (default: 1800); one that says nothing for {SILENCE} s is ended before")
    p.add_argument("--smp", type=int, default=2)
    p.add_argument("--memory", default="2048", metavar="MIB")
    p.add_argument("--hugepages", type=int, default=64, metavar="N")
    p.add_argument("--list", action="store_true", help="print the machines of the matrix and stop")
    p.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1, metavar="N",
                   help="machines at a time (default: one more than CPUs)")
    # A machine's own process, and one that compares the library with the kernel's selftest.
    p.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--selftest", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("-q", "--quiet", action="store_true", help="no case lines, only the table")
    p.add_argument("runner_arguments", nargs="*", metavar="ARGUMENT", help="after --: for the runner")
    options = p.parse_args()
    options.filter = os.environ.get("FILTER", "")
    machine.die_cleanly()
    try:
        pairs = matrix(os.environ)
    except ValueError as error:
        p.error(str(error))
    if options.list:
        print("\n".join(f"{name} {abi or '-'}" for name, abi in pairs))
        return 0
    if not any((options.programs / d / RUNNER).exists() for d in ("", "bin")):
        p.error(f"no {RUNNER} in {options.programs}")

    if options.one:
        return run_one(*pairs[0], options)
    machines = [(name, abi, False) for name, abi in pairs]
    if (kernels.PATCHED, SELFTEST_ABI) in pairs and (not options.filter or SELFTEST in options.filter):
        machines.append((kernels.PATCHED, SELFTEST_ABI, True))
    try:
        results = run_all(machines, options)
    except machine.Interrupted as error:
        print(f"tier: interrupted by {error}", file=sys.stderr)
        return 143
    entries = [entry for _, found in results for entry in found]
    # Never a file from an earlier run: it would speak of other programs.
    write_json(options.json, entries)
    table(entries)
    if any(e["failed"] for e in entries):
        return 1
    return 0 if any(status != 77 for status, _ in results) else 77


def run_one(name, abi, options):
    """Runs one machine in a process of its own: prints its cases, writes its rows (--json)."""
    tries = SELFTEST_TRIES if options.selftest else 1
    for n in range(1, tries + 1):
        reader = cases.Reader((lambda line: None) if options.quiet else (lambda line: print(line, flush=True)))
        status = 0
        try:
            problem = boot(name, abi, options, reader)
        except machine.Interrupted as error:
            print(f"tier: interrupted by {error}", file=sys.stderr)
            return 143
        except Broken as error:
            problem = str(error)
        except (Unavailable, OSError) as error:
            print(f"tier: skipped: {error}", flush=True)
            write_json(options.json, [dict(zip(ROW_KEYS, (name, abi, None, "machine", 0, 0, 1, str(error))))])
            return 77
        fault = not_the_librarys(problem, [c.reason for c in reader.cases if c.result == "FAIL"])
        if not fault or n == tries:
            break
        print(f"tier: not the library's fault, try {n} of {tries}: {fault}", flush=True)
    if problem:
        print(f"tier: FAILED: {problem}", flush=True)
    write_json(options.json, rows(name, abi, reader, problem))
    return status


def run_all(machines, options):
    """[(status, rows)] in the order of `machines`, of which --jobs run at a time.

    An emulated machine keeps one CPU busy, except for a fifth of its time, in which its cases wait.
    What a machine prints is shown when it is done. The comparison of speeds runs alone, after the
    others.
    """
    # The longest first, so that no CPU is idle at the end: unpatched kernels run everything.
    length = {abi: n for n, abi in enumerate((None, *FILTERS))}
    waiting = sorted(enumerate(machines), key=lambda m: (m[1][2], length.get(m[1][1], 0)))
    results, running = {}, {}
    with tempfile.TemporaryDirectory(prefix="kvmfault-tier.") as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < options.jobs and not (running and waiting[0][1][2]):
                    n, (name, abi, with_selftest) = waiting.pop(0)
                    print(f"# started: {describe(name, abi, with_selftest)}", flush=True)
                    running[n] = start_one(pathlib.Path(scratch), n, name, abi, with_selftest, options)
                for n in [n for n, (process, *_) in running.items() if process.poll() is not None]:
                    process, log, rows_file, since = running.pop(n)
                    print(f"# {describe(*machines[n])}: {time.monotonic() - since:.1f} s", flush=True)
                    print(log.read_text(errors="replace"), end="", flush=True)
                    name, abi, _ = machines[n]
                    died = [dict(zip(ROW_KEYS, (name, abi, None, "machine", 0, 1, 0, f"tier itself ended with status {process.returncode}")))]
                    found = json.loads(rows_file.read_text()) if rows_file.exists() else died
                    results[n] = (process.returncode, found)
                time.sleep(0.1)
        finally:
            for process, *_ in running.values():
                process.terminate()  # it ends its QEMU and cleans up
            for process, *_ in running.values():
                process.wait()
    return [results[n] for n in range(len(machines))]


def describe(name, abi, with_selftest):
    return f"{name}{f', patched: {abi}' if abi else ''}{', beside the kernel selftest' if with_selftest else ''}"


def start_one(scratch, n, name, abi, with_selftest, options):
    log, rows_file = scratch / f"{n}.log", scratch / f"{n}.json"
    environment = dict(os.environ, KERNEL=name, ABI=abi or "stock")
    words = ["--one", "--json", rows_file, "--programs", options.programs, "--timeout", options.timeout, "--smp", options.smp,
             "--memory", options.memory, "--hugepages", options.hugepages]
    words += ["--modules", options.modules] if options.modules else []
    words += ["--quiet"] if options.quiet else []
    for copy in options.copy:
        words += ["--copy", copy]
    if with_selftest:
        words.append("--selftest")
        environment.setdefault("KVMFAULT_VM_TCG_THREAD", "multi")
    words += ["--", *options.runner_arguments]
    with open(log, "w") as output:
        process = subprocess.Popen([sys.executable, "-m", "kvmfault_vm.tier", *map(str, words)], env=environment,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    return process, log, rows_file, time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
