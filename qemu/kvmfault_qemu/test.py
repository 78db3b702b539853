# SPDX-License-Identifier: MIT OR Apache-2.0
"""qemu/test: every case with every mechanism on this machine's /dev/kvm."""

import argparse
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time

from kvmfault_vm import machine
from kvmfault_vm.cache import PROJECT

from . import report
from .cases import CASES, Run
from .migration import Skipped
from .process import Setting
from .qmp import Failed

MECHANISMS = ("qemu", "poison-trap", "memslot-flag", "auto")
# It ends up with one of the others, which run everything.
CASES_OF_AUTO = ("postcopy", "precopy", "private")
MEASURED_CASES = ("postcopy", "postcopy-preempt")
EPILOG = """
mechanisms: `qemu` is QEMU's own path, fault-exits=off; with the others the destination has fault-exits=NAME.
exit status: 0 all passed; 1 something failed; 77 nothing could be run here
"""


def built(*words):
    """(path, None) or (None, why not) from build.sh."""
    build = subprocess.Popen([pathlib.Path(__file__).resolve().parent.parent / "build.sh", *words],
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        path = build.communicate()[0].strip()
    finally:
        build.terminate()
        build.wait()
    if build.returncode == 122:
        return None, "QEMU can't be built here (see above)"
    if build.returncode:
        raise Failed("QEMU could not be built (see above)")
    return pathlib.Path(path), None


def built_qemu():
    """(QEMU, its migration-test, None) or (None, None, why not)"""
    directory, reason = built("--with-tests")
    return (directory / "qemu-system-x86_64", directory / "migration-test", None) if directory else (None, None, reason)


def knows_fault_exits(qemu):
    """QEMU lists no properties of accelerators, but complains of unknown ones and of wrong values
    in different words.
    """
    said = subprocess.run([qemu, "-accel", "kvm,fault-exits=?"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace").stdout
    return "does not accept" in said


def no_kvm():
    """Why /dev/kvm can't be used, or None."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    return None


def log_directory(options, mechanism, case):
    return options.logs / f"{options.kernel_name}-{mechanism}-{case}"


def run_case(options, sockets, mechanism, case, known, unavailable):
    """One row."""
    row = report.row(kernel=options.kernel_name, mechanism=mechanism, case=case)
    start = time.monotonic()
    logs = log_directory(options, mechanism, case)
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    here = pathlib.Path(tempfile.mkdtemp(dir=sockets))
    setting = Setting(qemu=options.qemu, guest=options.guest, logs=logs, sockets=here, memory=options.memory, cpus=options.cpus,
                      patience=options.patience, migration_test=options.migration_test)
    fault_exits = None if not known else "off" if mechanism == "qemu" else mechanism
    run = Run(setting, mechanism, fault_exits, options.bandwidth << 20, row, unavailable)
    try:
        if mechanism != "qemu" and not known:
            raise Skipped("this QEMU has no fault-exits")
        CASES[case](run)
        row.update(result="PASS", reason=run.note)
    except Skipped as error:
        report.clear(row)
        row.update(result="SKIP", reason=str(error))
    except Failed as error:
        row.update(result="FAIL", reason=f"{error}; logs: {logs}")
    row["seconds"] = round(time.monotonic() - start, 1)
    return row


def parser():
    p = argparse.ArgumentParser(prog="test", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
                                description="Migrates a guest that checks all its memory between two QEMUs; writes target/qemu.json.")
    p.add_argument("--qemu", type=pathlib.Path, metavar="PATH", help="a qemu-system-x86_64 (default: what build.sh builds)")
    p.add_argument("--guest", type=pathlib.Path, metavar="PATH", help="the guest's ROM (default: what build.sh --guest builds)")
    p.add_argument("--migration-test", type=pathlib.Path, metavar="PATH",
                   help="QEMU's own, of the same build (default: what build.sh builds, unless --qemu is given)")
    p.add_argument("--mechanism", action="append", choices=MECHANISMS, help="only this one; may be repeated")
    p.add_argument("--case", action="append", choices=CASES, help="only this one; may be repeated")
    p.add_argument("--json", type=pathlib.Path, default=PROJECT / "target/qemu.json", metavar="FILE")
    # Prints the JSON, and the logs of what failed, for the tier.
    p.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--logs", type=pathlib.Path, default=PROJECT / "target/qemu/logs", metavar="DIR")
    p.add_argument("--memory", type=int, default=144, metavar="MIB", help="of the guest (default: 144; it checks all but 2)")
    p.add_argument("--cpus", type=int, default=2, metavar="N", help="of the guest (default: 2)")
    p.add_argument("--bandwidth", type=int, default=32, metavar="MIB", help="a second, of the connection (default: 32)")
    p.add_argument("--rounds", type=int, default=1, metavar="N", help="of what is measured, the mechanisms in turns; the medians count")
    p.add_argument("--patience", type=float, default=60, metavar="S", help="how long any one wait may take (default: 60)")
    p.add_argument("--kernel-name", default=platform.release(), metavar="NAME", help="what the JSON calls this kernel")
    return p


def main():
    options = parser().parse_args()
    machine.die_cleanly()
    rows = []
    try:
        reason = no_kvm()
        if not reason and not options.qemu:
            options.qemu, options.migration_test, reason = built_qemu()
        if not reason and not options.guest:
            options.guest, reason = built("--guest")
        if reason:
            rows = [report.row(kernel=options.kernel_name, result="SKIP", reason=reason)]
            print(f"test: skipped: {reason}", flush=True)
            return 77
        known = knows_fault_exits(options.qemu)
        # mechanism: the warning with which it was refused for memory that it could serve
        unavailable = {}
        with tempfile.TemporaryDirectory(prefix="kvmfault-qemu.") as sockets:
            # The mechanisms in turns, so that what else goes on here is the same for all that are
            # compared.
            for case in options.case or CASES:
                mechanisms = [m for m in options.mechanism or MECHANISMS if m != "auto" or options.case or case in CASES_OF_AUTO]
                rounds = {mechanism: [] for mechanism in mechanisms}
                for _ in range(options.rounds if case in MEASURED_CASES else 1):
                    for mechanism in mechanisms:
                        rounds[mechanism].append(run_case(options, sockets, mechanism, case, known, unavailable))
                        if options.rounds > 1:
                            print(f"# {report.line(rounds[mechanism][-1])}", flush=True)
                for mechanism in mechanisms:
                    rows.append(report.merged(rounds[mechanism]))
                    print(report.line(rows[-1]), flush=True)
                    if options.rows:
                        print(report.ROW + json.dumps(rows[-1]), flush=True)
                        if rows[-1]["result"] == "FAIL":
                            print(*report.logs(log_directory(options, mechanism, case)), sep="\n", flush=True)
    except Failed as error:
        rows.append(report.row(kernel=options.kernel_name, result="FAIL", reason=str(error)))
        print(f"test: FAILED: {error}", flush=True)
    except machine.Interrupted as error:
        print(f"test: interrupted by {error}", file=sys.stderr)
        return 143
    finally:
        # Never a file from an earlier run: it would speak of another QEMU.
        report.write_json(options.json, rows)
        if not options.rows:
            print(*report.ratios(rows), sep="\n")
        print(report.totals(rows), flush=True)
    return 1 if any(r["result"] == "FAIL" for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
