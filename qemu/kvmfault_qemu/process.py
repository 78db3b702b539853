# SPDX-License-Identifier: MIT OR Apache-2.0
"""One QEMU with our guest in it."""

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import time

from .qmp import Failed, Qmp
from .serial import Serial

# What the patched QEMU prints, see patches/.
ARMED = re.compile(r"kvm_faults_listen .*us=(\d+)")
FAULTS = re.compile(r"kvm_faults_end .*mechanism=(\S+) vcpu_faults=(\d+) .*slots=(\d+)")
WARNING = "fault-exits: "


@dataclasses.dataclass
class Setting:
    """What all QEMUs of a case have in common."""
    qemu: pathlib.Path
    guest: pathlib.Path
    logs: pathlib.Path
    sockets: pathlib.Path
    memory: int  # MiB
    cpus: int
    patience: float  # seconds, for any one wait
    machine: str = "pc"
    private: bool = False
    migration_test: pathlib.Path | None = None  # QEMU's


def outlived_by_nobody():
    """The beginning of a command that doesn't outlive us, even if we are killed."""
    words = ["setpriv", "--pdeathsig", "KILL", "--"]
    try:
        works = subprocess.run([*words, "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        works = False
    # Busybox's knows no such option; in a machine of its own there is nobody to outlive.
    return words if works else []


class Qemu:
    def __init__(self, setting, name, fault_exits=None, incoming=False):
        self.setting, self.name = setting, name
        self.errors = setting.logs / f"{name}.stderr"
        serial_log, serial_input, qmp_socket = setting.logs / f"{name}.serial", setting.sockets / f"{name}.s", setting.sockets / f"{name}.q"
        backend = "memory-backend-ram" if setting.private else "memory-backend-memfd"
        share = "off" if setting.private else "on"
        command = [
            *outlived_by_nobody(), setting.qemu, "-name", name,
            "-accel", "kvm" + (f",fault-exits={fault_exits}" if fault_exits else ""),
            "-cpu", "kvm64", "-smp", setting.cpus, "-m", f"{setting.memory}M",
            "-object", f"{backend},id=ram,size={setting.memory}M,share={share}",
            "-machine", f"{setting.machine},memory-backend=ram", "-bios", setting.guest,
            # Needs a ROM of QEMU's, for guests that write to the TPR.
            "-global", "kvm-apic.vapic=off",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-chardev", f"file,id=serial,path={serial_log},input-path={serial_input}", "-serial", "chardev:serial",
            "-chardev", f"socket,id=qmp,path={qmp_socket},server=on,wait=off", "-mon", "chardev=qmp,mode=control",
            *(["-incoming", "defer"] if incoming else []),
            # The one event that tells what was served; an unpatched QEMU has none of that name.
            *(["-trace", "kvm_faults_*"] if fault_exits else []),
        ]
        command = list(map(str, command))
        self.serial = Serial(serial_log, serial_input)
        self.qmp = None
        with open(self.errors, "w") as errors:
            print("#", *command, file=errors, flush=True)
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        try:
            self.connect(qmp_socket)
        except BaseException:
            self.end()
            raise

    def connect(self, path):
        deadline = time.monotonic() + self.setting.patience
        while True:
            try:
                self.qmp = Qmp(self.name, path, self.setting.patience)
                return
            except Failed:
                self.explain()
                raise
            except OSError:
                self.check()
                if time.monotonic() > deadline:
                    raise Failed(f"{self.name}: no QMP within {self.setting.patience:g} s")
                time.sleep(0.05)

    def said(self):
        """What it printed, without our own first line."""
        return [line for line in self.errors.read_text(errors="replace").splitlines() if not line.startswith("#")]

    def check(self):
        """Fails if the process has ended, or its guest has found a wrong byte."""
        status = self.process.poll()
        if status is not None:
            last = self.said()[-1:] or ["without a word"]
            raise Failed(f"{self.name}: QEMU ended (status {status}): {last[0]}")
        self.serial.poll()
        if self.serial.wrong:
            raise Failed(f"{self.name}: the guest found {self.serial.wrong}")

    def warnings(self):
        """Why fault exits aren't used."""
        return [line for line in self.said() if WARNING in line]

    def vcpu_faults(self):
        """(mechanism, faults, slots), or None if it doesn't say."""
        found = [FAULTS.search(line) for line in self.said()]
        found = [m for m in found if m]
        return (found[-1][1], int(found[-1][2]), int(found[-1][3])) if found else None

    def arm_ms(self):
        """How long it took to make the slots anew, with the guest stopped.

        None if it doesn't say.
        """
        found = [ARMED.search(line) for line in self.said()]
        return next((int(m[1]) / 1000 for m in found if m), None)

    def execute(self, command, **arguments):
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return self.qmp.execute(command, arguments or None, self.setting.patience)
        except Failed:
            self.explain()
            raise

    def explain(self):
        """Raises the better reason for a broken connection, if the process has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self.check()

    def migration(self):
        return self.execute("query-migrate")

    def end(self):
        self.process.kill()
        self.process.wait()
        self.serial.close()
        if self.qmp:
            self.qmp.close()
