# SPDX-License-Identifier: MIT OR Apache-2.0
"""The whole matrix: the installed test programs on every kernel, and on the patched one in every ABI."""

import argparse
import collections
import json
import os
import pathlib
import sys
import time

from . import cache, cases, command, kernels, machine
from .cache import Broken, Unavailable

PROGRAMS = "/opt/kvmfault"  # where --programs is in the guest
RUNNER = "kvmfault-runner"
ROW_KEYS = ("kernel", "abi", "mechanism", "group", "passed", "failed", "skipped", "reason")

EPILOG = """
environment (all optional; several values are separated by blanks or commas):
  KERNEL   stock-6.1, stock-6.12, newest, or a kernel release; default: all three, stock and patched
  ABI      kvm.fault_abi values; only the patched kernel is booted then, unless KERNEL asks for more; `stock` = unpatched
  FILTER   handed to the runner, as its argument and in FILTER

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


def boot(name, abi, options, reader):
    """One machine; returns a reason why the run as a whole failed, or None."""
    kernel = kernels.find(name)
    filters = [options.filter] if options.filter else []
    words = ["env", f"FILTER={options.filter}", f"PATH={PROGRAMS}:{PROGRAMS}/bin:/bin:/sbin", f"KVMFAULT_VM_KERNEL={name}",
             f"KVMFAULT_VM_ABI={abi or ''}", RUNNER, *options.runner_arguments, *filters]
    outcome = command.run(kernel, words, [(options.programs, PROGRAMS), *command.copies(options.copy)], abi=abi, module_directory=options.modules,
                          hugepages=options.hugepages, smp=options.smp, memory=options.memory,
                          timeout=options.timeout, output=reader.feed)
    reader.close()
    if outcome.problem:
        return f"{outcome.problem}; log: {outcome.log}"
    contradiction = reader.contradiction()
    if contradiction:
        return f"{contradiction}, its status was {outcome.status}; log: {outcome.log}"
    if outcome.status and not reader.totals[1]:
        return f"the runner's status was {outcome.status} though no case failed; log: {outcome.log}"
    return None


def rows(name, abi, reader, problem):
    """The entries of vm.json for one machine."""
    groups = collections.OrderedDict()
    for case in reader.cases:
        groups.setdefault((case.mechanism, case.group), []).append(case)
    found = []
    for (mechanism, group), members in groups.items():
        reasons = dict.fromkeys(f"{c.name}: {c.reason}" for c in members if c.result != "PASS")
        found.append(dict(zip(ROW_KEYS, (
            name, abi, mechanism, group, *(sum(c.result == r for c in members) for r in ("PASS", "FAIL", "SKIP")),
            "; ".join(reasons) or None))))
    if problem:
        # The machine itself is a case: a guest kernel that warned fails the tier even if all its cases passed.
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
    print("%d passed, %d failed, %d skipped" % tuple(total(entries, k) for k in ("passed", "failed", "skipped")))


def main():
    p = argparse.ArgumentParser(prog="tier", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
                                description="Runs the installed test programs on every kernel; writes target/vm.json.")
    p.add_argument("--programs", required=True, type=pathlib.Path, metavar="DIR",
                   help=f"holds {RUNNER} (or bin/{RUNNER}), the case programs and libkvmfault.so.0")
    p.add_argument("--copy", action="append", default=[], metavar="FILE[:DEST]", help="more for the guests, as in vm-run")
    p.add_argument("--json", type=pathlib.Path, default=cache.PROJECT / "target/vm.json", metavar="FILE")
    p.add_argument("--modules", metavar="DIR", help="a KVM that is broken on purpose, see c-tests/kernel/mutations")
    p.add_argument("--timeout", type=float, default=300, metavar="S", help="for each machine (default: 300)")
    p.add_argument("--smp", type=int, default=2)
    p.add_argument("--memory", default="2048", metavar="MIB")
    p.add_argument("--hugepages", type=int, default=64, metavar="N")
    p.add_argument("--list", action="store_true", help="print the machines of the matrix and stop")
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

    entries, ran = [], False
    for name, abi in pairs:
        print(f"# {name}{f', patched: {abi}' if abi else ''}", flush=True)
        reader = cases.Reader((lambda line: None) if options.quiet else (lambda line: print(line, flush=True)))
        start = time.monotonic()
        try:
            problem = boot(name, abi, options, reader)
            ran = True
        except machine.Interrupted as error:
            print(f"tier: interrupted by {error}", file=sys.stderr)
            return 143
        except Broken as error:
            problem, ran = str(error), True
        except (Unavailable, OSError) as error:
            print(f"tier: {name}{f' {abi}' if abi else ''} skipped: {error}", file=sys.stderr, flush=True)
            entries.append(dict(zip(ROW_KEYS, (name, abi, None, "machine", 0, 0, 1, str(error)))))
            continue
        if problem:
            print(f"tier: {name}{f' {abi}' if abi else ''} FAILED: {problem}", file=sys.stderr, flush=True)
        entries += rows(name, abi, reader, problem)
        print(f"# {time.monotonic() - start:.1f} s", flush=True)
    # Never a file from an earlier run: it would speak of other programs.
    write_json(options.json, entries)
    table(entries)
    if any(e["failed"] for e in entries):
        return 1
    return 0 if ran else 77


if __name__ == "__main__":
    sys.exit(main())
