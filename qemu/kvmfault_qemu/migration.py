# SPDX-License-Identifier: MIT OR Apache-2.0
"""A source, a destination and a connection between them."""

import time

from . import serial
from .process import Qemu
from .proxy import Proxy
from .qmp import Failed

UNLIMITED = 10 << 30
WARM_UP = 1.5  # seconds of the guest's time to learn its TSC's rate from
NOT_PRECOPY = ("postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover", "completed")


class Skipped(Exception):
    """What makes a case impossible here; the message is its reason."""


class Migration:
    """The steps of a migration, in the order in which a case takes them.

    A context: its processes end with it.
    """

    def __init__(self, setting, fault_exits, bandwidth, *, must_use=False, postcopy=True, preempt=False, multifd=False):
        self.setting, self.fault_exits, self.bandwidth = setting, fault_exits, bandwidth
        self.must_use, self.postcopy, self.preempt, self.multifd = must_use, postcopy, preempt, multifd
        self.processes, self.connections = [], 0
        self.source = self.destination = self.network = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.network:
            self.network.kill()
        for process in self.processes:
            process.end()

    # ---- waiting ----
    def wait(self, what, condition, *alive, patience=None):
        """Until condition() is true.

        What it returned. Fails if one of the processes ends or finds a wrong byte.
        """
        patience = patience or self.setting.patience
        deadline = time.monotonic() + patience
        while True:
            for process in alive:
                process.check()
            found = condition()
            if found:
                return found
            if time.monotonic() > deadline:
                states = ", ".join(f"{p.name}: {self.status(p)}" for p in alive)
                raise Failed(f"waited {patience:g} s for {what} ({states})")
            time.sleep(0.05)

    @staticmethod
    def status(process):
        return process.migration().get("status", "none")

    def until_status(self, process, *wanted):
        def reached():
            info = process.migration()
            if info.get("status") in ("failed", "cancelled") and info["status"] not in wanted:
                raise Failed(f"{process.name}: migration {info['status']} while waiting for {wanted[0]}: {info.get('error-desc', 'no reason given')}")
            return info.get("status") in wanted
        self.wait(f"the {process.name} to be {' or '.join(wanted)}", reached, process)

    # ---- steps ----
    def start(self, name, incoming=False):
        process = Qemu(self.setting, name, self.fault_exits if incoming else None, incoming)
        self.processes.append(process)
        if incoming and self.must_use and process.warnings():
            raise Skipped(process.warnings()[0])
        return process

    def start_source(self):
        self.source = self.start("source")
        passes = self.source.serial.passes
        self.wait("the guest's first passes", lambda: len(passes) > 2 and passes[-1][0] - passes[0][0] > WARM_UP, self.source)
        self.ask(self.source, "r", "order random")

    def start_destination(self, name="destination"):
        self.destination = self.start(name, incoming=True)

    def ask(self, process, letter, pattern):
        process.serial.poll()
        since = len(process.serial.lines)
        process.serial.send(letter)
        return self.wait(f"the guest's answer to {letter!r}", lambda: process.serial.answer(pattern, since), process)

    def address(self):
        self.connections += 1
        return self.setting.sockets / f"m{self.connections}"

    def configure(self, process, **parameters):
        wanted = {"postcopy-ram": self.postcopy, "postcopy-preempt": self.preempt, "postcopy-blocktime": self.postcopy,
                  "multifd": self.multifd}
        try:
            process.execute("migrate-set-capabilities",
                            capabilities=[{"capability": name, "state": state} for name, state in wanted.items()])
        except Failed as error:
            # QEMU before 10.1: "Postcopy is not yet compatible with multifd".
            if self.multifd and self.postcopy and "multifd" in str(error):
                raise Skipped(str(error))
            raise
        process.execute("migrate-set-parameters", **parameters)

    def connect(self, source=None, destination=None, network=False):
        """network: with something between them that can be killed."""
        source, destination = source or self.source, destination or self.destination
        if self.postcopy:
            # So short a downtime is never reached: only the switch ends the first phase.
            parameters = dict(max_bandwidth=self.bandwidth, max_postcopy_bandwidth=self.bandwidth, downtime_limit=1)
        else:
            # So long a downtime is reached at once: the guest writes faster than any connection.
            parameters = dict(max_bandwidth=UNLIMITED, downtime_limit=60000)
        self.configure(destination, **parameters)
        self.configure(source, **parameters)
        address = self.address()
        destination.execute("migrate-incoming", uri=f"unix:{address}")
        if network:
            listening, address = address, self.address()
            self.network = Proxy(address, listening)
        source.execute("migrate", uri=f"unix:{address}")

    def recover(self):
        """A new connection for a migration that has lost its own."""
        address = self.address()
        self.destination.execute("migrate-recover", uri=f"unix:{address}")
        self.source.execute("migrate", uri=f"unix:{address}", resume=True)

    def snapshot(self, process, file):
        """The guest runs on, for some seconds, while the file is written."""
        states = {name: False for name in ("postcopy-ram", "postcopy-preempt", "postcopy-blocktime")} | {"background-snapshot": True}
        process.execute("migrate-set-capabilities",
                        capabilities=[{"capability": name, "state": state} for name, state in states.items()])
        process.execute("migrate-set-parameters", max_bandwidth=self.bandwidth)
        process.execute("migrate", uri=f"file:{file}")
        self.until_status(process, "completed")

    def sent(self, part):
        """Until that part of memory has gone over in the first phase."""
        def reached():
            info = self.source.migration()
            if info.get("status") in ("failed", "completed"):
                raise Failed(f"source: {info['status']} in the first phase: {info.get('error-desc', '')}")
            ram = info.get("ram", {})
            return ram.get("transferred", 0) > part * ram.get("total", 1 << 60)
        self.wait(f"{part:.0%} of memory to be sent", reached, self.source, self.destination)

    def switch(self):
        """To post-copy, with the guest's clock for faults at zero."""
        self.ask(self.source, "z", "zeroed")
        self.source.execute("migrate-start-postcopy")
        self.until_status(self.source, *NOT_PRECOPY)
        self.wait("the guest to run on the destination", lambda: self.destination.execute("query-status")["status"] == "running",
                  self.destination)

    def still_missing(self):
        if self.status(self.source) != "postcopy-active":
            raise Failed(f"post-copy was over too early for this case (source: {self.status(self.source)}): a lower --bandwidth helps")

    def completed(self, source=None, destination=None):
        source, destination = source or self.source, destination or self.destination
        self.until_status(source, "completed")
        self.until_status(destination, "completed")

    def verify(self, process, passes=2):
        """Until every CPU has checked all its memory a few times more."""
        process.serial.poll()
        first = len(process.serial.passes)
        self.wait(f"{passes} more passes of the guest on the {process.name}", lambda: process.serial.finished_since(first) >= passes,
                  process)

    # ---- results ----
    def downtime_ms(self):
        """From the source's stop to the destination's start.

        QEMU's own `downtime` takes the whole of post-copy for downtime if the true one is below a
        millisecond (migration_downtime_end).
        """
        for process in (self.source, self.destination):
            process.execute("query-status")  # reads the events before it
        stopped, running = self.source.qmp.first("STOP"), self.destination.qmp.first("RESUME")
        return round((running - stopped) * 1000, 1) if stopped and running else None

    def measurements(self):
        """Of a completed post-copy phase; to be called soon after, as the guest's clock goes on."""
        matched = self.ask(self.destination, "h", serial.HISTOGRAM)
        source, destination = self.source.migration(), self.destination.migration()
        # An access to a page that is there, but not mapped in the destination's KVM yet, takes long
        # as well. How many pages were asked for is known; these are the slowest accesses.
        faults = source.get("ram", {}).get("postcopy-requests", 0)
        slowest = serial.slowest(serial.buckets(matched), faults) if faults else []
        rate = self.source.serial.ticks_per_us()
        found = dict(downtime_ms=self.downtime_ms(), faults=faults, blocktime_ms=destination.get("postcopy-blocktime"))
        for name, part in (("fault_p50_us", 0.5), ("fault_p99_us", 0.99)):
            ticks = serial.percentile(slowest, part) if slowest else None
            found[name] = round(ticks / rate, 1) if ticks else None
        return found
