# SPDX-License-Identifier: MIT OR Apache-2.0
"""One run of an emulated machine."""

import dataclasses
import os
import pathlib
import selectors
import signal
import subprocess
import time

from . import guestlog
from .cache import CACHE

KEPT_LOGS = 100
# After a panic the kernel reboots, which ends QEMU (-no-reboot); a kernel too broken for that is
# not waited for.
PANIC_GRACE = 10

# Debian 12's QEMU 7.2 with thread=multi loses to the kernel's own code patching about one boot in
# ten ("Oops: int3"), so emulation is single-threaded unless told otherwise.
ACCELERATOR = f"tcg,thread={os.environ.get('KVMFAULT_VM_TCG_THREAD', 'single')}"
# Without fast string instructions, which emulation does byte by byte: with them kernel and libc
# copy pages by them, and everything takes a fifth longer.
CPU = "EPYC-Milan,+svm,+npt,-erms,-fsrm"

# An overloaded host stalls an emulated CPU for long without any fault of the guest's: lockups and
# stalls are reported after a minute and not after the default 20 s. What guards real processors
# against speculation only costs an emulated one time.
KERNEL_PARAMETERS = ("console=ttyS1 loglevel=7 printk.devkmsg=on panic=-1 oops=panic softlockup_panic=1 "
                     "watchdog_thresh=30 rcupdate.rcu_cpu_stall_timeout=60 mitigations=off")


class Interrupted(Exception):
    pass


@dataclasses.dataclass
class Outcome:
    status: int | None  # the command's exit status, if it came so far
    problem: str | None  # why the run is a failure whatever the status
    timed_out: bool
    seconds: float
    log: pathlib.Path


def boot(kernel, initrd, *, label, smp, memory, timeout, silence, append, output):
    """Boots, passes the command's output to output(bytes) as it comes, and judges the run.

    The run must end within `timeout` seconds, and print something every `silence` seconds if that
    is not None.
    """
    log = new_log(label)
    command = [
        # Whatever happens to us, even SIGKILL, QEMU doesn't outlive us.
        "setpriv", "--pdeathsig", "KILL", "--",
        "qemu-system-x86_64", "-accel", ACCELERATOR, "-cpu", CPU, "-smp", str(smp), "-m", str(memory),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-chardev", "stdio,id=command,signal=off", "-serial", "chardev:command",
        "-serial", f"file:{log}",
        "-kernel", str(kernel.image), "-initrd", str(initrd), "-append", f"{KERNEL_PARAMETERS} {append}".strip(),
    ]
    start = time.monotonic()
    with open(log.with_suffix(".qemu"), "w+") as errors:
        qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        try:
            overdue = pump(qemu, output, timeout, silence, log)
        finally:
            qemu.kill()
            qemu.wait()
        errors.seek(0)
        complaint = errors.read().strip()
    os.unlink(log.with_suffix(".qemu"))
    return judge(log, qemu.returncode, complaint, overdue, time.monotonic() - start)


def pump(qemu, output, timeout, silence, log):
    """Reads until QEMU ends, and returns None; or why that is not waited for any longer."""
    panic_seen, logged = None, 0
    start = heard = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(qemu.stdout, selectors.EVENT_READ)
        while True:
            now = time.monotonic()
            if now > start + timeout:
                return f"no end after {timeout:g} s"
            if silence and now > heard + silence:
                return f"no word for {silence:g} s"
            if panic_seen and now > panic_seen + PANIC_GRACE:
                return None
            if selector.select(1):
                data = os.read(qemu.stdout.fileno(), 65536)
                if not data:
                    qemu.wait()
                    return None
                output(data)
                heard = now
                continue
            size = log.stat().st_size if log.exists() else 0
            if size != logged:
                logged, heard = size, now
                if not panic_seen and "Kernel panic" in log.read_text(errors="replace"):
                    panic_seen = now


def judge(log, qemu_status, complaint, overdue, seconds):
    text = log.read_text(errors="replace") if log.exists() else ""
    status = guestlog.said(text, "exit")
    trouble = guestlog.trouble(text)
    failed = guestlog.said(text, "failed")
    problem = None
    if trouble:
        problem = f"the guest kernel {trouble[0]}: {trouble[1]}"
    elif failed:
        problem = f"the guest could not be set up: {failed}"
    elif status is None and overdue:
        where = "the command was still running" if guestlog.said(text, "running") is not None else "the guest was still booting"
        problem = f"{overdue}: {where}"
    elif status is None:
        problem = f"QEMU ended (status {qemu_status}) before the command did{': ' + complaint if complaint else ''}"
    return Outcome(status=int(status) if status is not None else None, problem=problem,
                   timed_out=bool(overdue) and status is None and not trouble, seconds=seconds, log=log)


def written_at(path):
    """Machines that start at the same time clear away the same files."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0


def new_log(label):
    logs = CACHE / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for old in sorted(logs.glob("*.log"), key=written_at)[:-KEPT_LOGS]:
        old.unlink(missing_ok=True)
    return logs / f"{label}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


def die_cleanly():
    """Signals become an exception, so that every `finally` runs."""
    def interrupt(number, _frame):
        raise Interrupted(signal.Signals(number).name)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, interrupt)
