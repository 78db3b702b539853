# SPDX-License-Identifier: MIT OR Apache-2.0
"""The post-copy cases of QEMU's own migration-test, with our accelerator property and with memory
that can be shared.
"""

import os
import pathlib
import re
import selectors
import subprocess
import time

from .migration import Skipped
from .process import FAULTS, outlived_by_nobody
from .qmp import Failed

TESTS = "/x86_64/migration/postcopy/"
FIRMWARE = [pathlib.Path("/usr/share/seabios/bios-256k.bin"), pathlib.Path("/usr/share/qemu/kvmvapic.bin")]
PATIENCE = 5  # times that of one wait, for each of its tests
VERDICT = re.compile(r"^(ok|not ok) \d+ (\S+)( # SKIP.*)?$")

# migration-test takes any program whose name ends in -system-x86_64. It wants a q35, whose disk
# SeaBIOS waits for without end under KVM in an emulated machine, whatever our property says; a pc
# does as well.
WRAPPER = """#!/bin/sh
memory=
case "$*" in *"-m 150M"*) memory="-object memory-backend-memfd,id=kvmfault-ram,size=150M,share=on -machine memory-backend=kvmfault-ram" ;; esac
for word; do
	shift
	case "$word" in
	kvm) word={accelerator} ;;
	pc-q35-*) word="pc,${{word#*,}}" ;;
	esac
	set -- "$@" "$word"
done
exec {qemu} {firmware} {trace} -nic none -vga none "$@" $memory
"""


def lines(pipe, patience):
    """Yields line by line; TimeoutError if a TAP verdict takes longer than `patience` seconds."""
    deadline, rest = time.monotonic() + patience, b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0, deadline - time.monotonic())):
                raise TimeoutError(f"no verdict within {patience:g} s")
            data = os.read(pipe.fileno(), 65536)
            if not data:
                return
            *complete, rest = (rest + data).split(b"\n")
            for line in (one.decode(errors="replace") for one in complete):
                if VERDICT.match(line):
                    deadline = time.monotonic() + patience
                yield line


def postcopy(run):
    program = run.setting.migration_test
    if not program:
        raise Skipped("no migration-test: --migration-test names it")
    missing = [str(f) for f in FIRMWARE if not f.exists()]
    if missing:
        raise Skipped(f"no {', '.join(missing)} for migration-test: apt-get install seabios qemu-system-data")
    wrapper = run.setting.sockets / "qemu-system-x86_64"
    accelerator = f"kvm,fault-exits={run.fault_exits}" if run.fault_exits else "kvm"
    firmware = " ".join(f"-L {f.parent}" for f in FIRMWARE)
    trace = "-trace 'kvm_faults_*'" if run.fault_exits else ""
    wrapper.write_text(WRAPPER.format(accelerator=accelerator, trace=trace, qemu=run.setting.qemu, firmware=firmware))
    wrapper.chmod(0o755)
    environment = dict(os.environ, QTEST_QEMU_BINARY=str(wrapper))
    # Each by its name: of a path it runs only what is directly below.
    listed = subprocess.run([program, "-l"], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout
    wanted = [name for name in listed.split() if name.startswith(TESTS)]
    log = run.setting.logs / "migration-test.stderr"
    verdicts, begun = [], time.monotonic()
    with open(log, "w") as out:
        command = [*outlived_by_nobody(), program, "--tap", "-k", *(w for name in wanted for w in ("-p", name))]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        try:
            for line in lines(process.stdout, PATIENCE * run.setting.patience):
                print(line, file=out, flush=True)
                matched = VERDICT.match(line)
                if matched:
                    verdicts.append(matched.groups())
                    print(f"# {matched[2]}[{run.mechanism}] {matched[1]}{matched[3] or ''}, {time.monotonic() - begun:.1f} s", flush=True)
                    begun = time.monotonic()
            status = process.wait()
        except TimeoutError as error:
            raise Failed(f"migration-test: {error}, {len(verdicts)} of {len(wanted)} cases")
        finally:
            process.terminate()  # it ends its QEMUs
            process.wait()
    said = log.read_text(errors="replace")
    failed = [name for verdict, name, _ in verdicts if verdict != "ok"]
    if status or failed or not wanted or len(verdicts) != len(wanted):
        raise Failed(f"migration-test: status {status}, {len(verdicts)} of {len(wanted)} cases, not ok: {', '.join(failed) or 'none'}")
    warnings = [text for text in said.splitlines() if "fault-exits" in text and not text.startswith("#")]
    if run.mechanism not in ("qemu", "auto") and warnings:
        raise Skipped(warnings[0])
    run.row.update(completed=True, verified=True)
    faults = [int(m[2]) for m in FAULTS.finditer(said)]
    run.row["vcpu_thread_faults"] = sum(faults) if faults else None
    run.note = ", ".join(name[len(TESTS):] for _, name, skipped in verdicts if not skipped)
