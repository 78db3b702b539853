# SPDX-License-Identifier: MIT OR Apache-2.0
"""qemu/tier: qemu/test in the emulated machines of c-tests/vm, with nested paging."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from kvmfault_vm import cache, cases, command, kernels, machine
from kvmfault_vm.cache import PROJECT, Broken, Unavailable

from . import python, qtest, report, test
from .qmp import Failed

HERE = pathlib.Path(__file__).resolve().parent
THERE = "/kvmfault"

# (kernel, kvm.fault_abi or None, mechanisms): each where it is at home, and QEMU's own path beside
# it.
MACHINES = [
    ("stock-6.12", None, ("qemu", "poison-trap", "auto")),
    ("stock-6.12", "v7", ("qemu", "memslot-flag", "auto")),
]
EPILOG = """
exit status: 0 all passed; 1 something failed; 77 nothing could be run here
"""


def label(kernel, abi):
    return f"{kernel}+{abi}" if abi else kernel


def boot(kernel, abi, mechanisms, options, files):
    """([rows], problem) of one machine."""
    name = label(kernel, abi)
    rows = []
    options.logs.mkdir(parents=True, exist_ok=True)
    with open(options.logs / f"{name}.out", "w") as kept:
        def line(text):
            print(text, file=kept, flush=True)
            if text.startswith(report.ROW):
                rows.append(json.loads(text[len(report.ROW):]))
            elif not cases.TOTALS.match(text):
                print(text, flush=True)
        reader = cases.Reader(line)
        words = ["env", f"PYTHONPATH={THERE}/qemu:{THERE}/c-tests/vm", "PYTHONDONTWRITEBYTECODE=1", python.PROGRAM, "-m", "kvmfault_qemu.test",
                 "--qemu", f"{THERE}/qemu-system-x86_64", "--guest", f"{THERE}/guest.bin", "--rows", "--kernel-name", name,
                 "--json", "/tmp/qemu.json", "--logs", "/tmp/logs", *options.test_arguments]
        words += ["--migration-test", f"{THERE}/migration-test"] if options.migration_test else []
        for mechanism in mechanisms:
            words += ["--mechanism", mechanism]
        outcome = command.run(kernels.find(kernel), words, files, abi=abi, smp=options.smp, memory=options.memory,
                              timeout=options.timeout, output=reader.feed)
        reader.close()
    if outcome.problem:
        return rows, f"{outcome.problem}; log: {outcome.log}"
    if reader.totals is None or not rows:
        return rows, f"qemu/test printed no totals, its status was {outcome.status}; output: {options.logs}/{name}.out"
    return rows, None


def parser():
    p = argparse.ArgumentParser(prog="tier", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
                                description="Runs qemu/test in emulated machines with nested paging; writes target/qemu.json.")
    p.add_argument("--qemu", type=pathlib.Path, metavar="PATH", help="a qemu-system-x86_64 (default: what build.sh builds)")
    p.add_argument("--guest", type=pathlib.Path, metavar="PATH", help="the guest's ROM (default: what build.sh --guest builds)")
    p.add_argument("--migration-test", type=pathlib.Path, metavar="PATH",
                   help="QEMU's own, of the same build (default: what build.sh builds, unless --qemu is given)")
    p.add_argument("--kernel", action="append", choices=[label(k, a) for k, a, _ in MACHINES], help="only this one; may be repeated")
    p.add_argument("--mechanism", action="append", choices=test.MECHANISMS, help="only this one; may be repeated")
    p.add_argument("--json", type=pathlib.Path, default=PROJECT / "target/qemu.json", metavar="FILE")
    p.add_argument("--logs", type=pathlib.Path, default=PROJECT / "target/qemu/logs", metavar="DIR")
    p.add_argument("--timeout", type=float, default=3600, metavar="S", help="for each machine (default: 3600)")
    p.add_argument("--smp", type=int, default=2)
    p.add_argument("--memory", default="2048", metavar="MIB", help="of the emulated machine")
    p.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="machines at a time (default: one a CPU)")
    p.add_argument("test_arguments", nargs="*", metavar="ARGUMENT", help="after --: for qemu/test, e.g. --case recover")
    return p


def one(kernel, abi, mechanisms, options):
    """A machine in this process: rows, always at least one."""
    name = label(kernel, abi)
    try:
        files = [(options.qemu, f"{THERE}/qemu-system-x86_64"), (options.guest, f"{THERE}/guest.bin"), (HERE, f"{THERE}/qemu/kvmfault_qemu"),
                 (PROJECT / "c-tests/vm/kvmfault_vm", f"{THERE}/c-tests/vm/kvmfault_vm"), *python.copies()]
        if options.migration_test:
            files += [(options.migration_test, f"{THERE}/migration-test")] + [(f, str(f)) for f in qtest.FIRMWARE if f.exists()]
        rows, problem = boot(kernel, abi, mechanisms, options, files)
    except (Unavailable, OSError) as error:
        return [report.row(kernel=name, case="machine", result="SKIP", reason=str(error))]
    except Broken as error:
        rows, problem = [], str(error)
    if problem:
        rows.append(report.row(kernel=name, case="machine", result="FAIL", reason=problem))
    return rows


def in_parallel(machines, options):
    """[rows] of each machine, each in a process of its own.

    What a machine says comes when it is done.
    """
    waiting, running, found = list(enumerate(machines)), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                n, (kernel, abi, mechanisms) = waiting.pop(0)
                name = label(kernel, abi)
                part = options.logs / f"{name}.json"
                words = ["--qemu", options.qemu, "--guest", options.guest, "--kernel", name, "--json", part, "--logs", options.logs,
                         "--timeout", options.timeout, "--smp", options.smp, "--memory", options.memory, "--jobs", 1]
                words += ["--migration-test", options.migration_test] if options.migration_test else []
                for mechanism in mechanisms:
                    words += ["--mechanism", mechanism]
                options.logs.mkdir(parents=True, exist_ok=True)
                part.unlink(missing_ok=True)
                log = open(options.logs / f"{name}.tier", "w+")
                print(f"# started: {name}", flush=True)
                process = subprocess.Popen([sys.executable, "-m", "kvmfault_qemu.tier", *map(str, words), "--", *options.test_arguments],
                                           stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
                running[n] = process, log, part, name
            for n in [n for n, (process, *_) in running.items() if process.poll() is not None]:
                process, log, part, name = running.pop(n)
                log.seek(0)
                # Totals and comparisons come once, of all machines.
                said = (text for text in log.read().splitlines() if not cases.TOTALS.match(text) and not report.is_ratio(text))
                print(*said, sep="\n", flush=True)
                log.close()
                found[n] = json.loads(part.read_text()) if part.exists() else [
                    report.row(kernel=name, case="machine", result="FAIL", reason=f"tier itself ended with status {process.returncode}")]
            time.sleep(0.2)
    finally:
        for process, *_ in running.values():
            process.terminate()  # it ends its machine
        for process, *_ in running.values():
            process.wait()
    return [found[n] for n in range(len(machines))]


def main():
    options = parser().parse_args()
    machine.die_cleanly()
    rows = []
    try:
        reason = None
        if not options.qemu:
            options.qemu, options.migration_test, reason = test.built_qemu()
        if not reason and not options.guest:
            options.guest, reason = test.built("--guest")
        if reason:
            rows = [report.row(case="machine", result="SKIP", reason=reason)]
        else:
            machines = [(k, a, [m for m in ms if m in (options.mechanism or ms)]) for k, a, ms in MACHINES
                        if label(k, a) in (options.kernel or [label(k, a)])]
            machines = [m for m in machines if m[2]]
            if len(machines) == 1:
                rows = one(*machines[0], options)
            else:
                rows = [row for found in in_parallel(machines, options) for row in found]
    except Failed as error:
        rows.append(report.row(case="machine", result="FAIL", reason=str(error)))
    except machine.Interrupted as error:
        print(f"tier: interrupted by {error}", file=sys.stderr)
        return 143
    # Never a file from an earlier run: it would speak of another QEMU.
    report.write_json(options.json, rows)
    for row in rows:
        if row["case"] == "machine":
            print(f"{row['result']} {row['kernel'] or 'all'}: {row['reason']}")
    print(*report.ratios(rows), sep="\n")
    print(report.totals(rows), flush=True)
    if any(r["result"] == "FAIL" for r in rows):
        return 1
    return 0 if any(r["case"] != "machine" for r in rows) else 77


if __name__ == "__main__":
    sys.exit(main())
