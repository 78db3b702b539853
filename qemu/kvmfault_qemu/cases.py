# SPDX-License-Identifier: MIT OR Apache-2.0
"""What is done to a source and a destination.

A case gets a Run, and raises Failed or Skipped unless all is well.
"""

import dataclasses

from . import qtest
from .migration import Migration, Skipped
from .process import Setting
from .qmp import Failed

PART = 0.4  # of memory that is sent before the switch
ANSWER = 10  # seconds that a monitor command may take though pages are missing


@dataclasses.dataclass
class Run:
    setting: Setting
    mechanism: str
    fault_exits: str | None  # the accelerator's property; None: it isn't mentioned
    bandwidth: int  # bytes a second
    row: dict  # results, added to as they come
    unavailable: dict  # of all runs: mechanism -> the warning with which shared memory was refused
    note: str | None = None  # worth saying although all is well

    def migration(self, **options):
        must_use = self.mechanism not in ("qemu", "auto") and not self.setting.private
        return Migration(self.setting, self.fault_exits, self.bandwidth, must_use=must_use, **options)


def finish(run, m):
    """From the switch to the verified end."""
    m.completed()
    run.row["completed"] = True
    run.row.update(m.measurements())
    m.verify(m.destination)
    run.row["verified"] = True
    faults = m.destination.vcpu_faults()
    if faults:
        run.row.update(vcpu_thread_faults=faults[1], arm_ms=m.destination.arm_ms())
    warnings = m.destination.warnings()
    if warnings:
        run.note = warnings[0]
        # The faults were served by QEMU's own path: their times are not the mechanism's.
        run.row.update(fault_p50_us=None, fault_p99_us=None)
        if not run.setting.private:
            run.unavailable[run.mechanism] = warnings[0]
        if m.must_use:
            raise Skipped(warnings[0])
    elif m.must_use and not faults:
        raise Failed(f"the destination doesn't say how many faults {run.mechanism} has served")
    elif m.must_use and not faults[1]:
        raise Failed(f"{run.mechanism} has served no fault: the guest slept until its pages came by themselves")


def up_to_switch(m, **options):
    m.start_source()
    m.start_destination()
    m.connect(**options)
    m.sent(PART)
    m.switch()


def postcopy(run, **options):
    with run.migration(**options) as m:
        up_to_switch(m)
        finish(run, m)


def postcopy_preempt(run):
    postcopy(run, preempt=True)


def multifd(run):
    """The first phase over several channels.

    These note a page of zeros as received and don't touch it, so that memory has a hole there.
    """
    postcopy(run, multifd=True)


def disconnected(run, m):
    """While there is no connection the guest waits for pages that nobody can bring.

    That must not stop the monitor.
    """
    m.until_status(m.source, "postcopy-paused")
    m.until_status(m.destination, "postcopy-paused")
    for command in ("query-status", "stop", "query-status", "cont"):
        m.destination.qmp.timed(command, ANSWER)
    m.recover()
    finish(run, m)


def recover(run):
    """The connection is closed while pages are missing, and there is another one later."""
    with run.migration() as m:
        up_to_switch(m)
        m.still_missing()
        m.source.execute("migrate-pause")
        disconnected(run, m)


def cut(run, **options):
    """The same, but neither side has closed it.

    What was between them is gone, with whatever it held.
    """
    with run.migration(**options) as m:
        up_to_switch(m, network=True)
        m.still_missing()
        m.network.kill()
        disconnected(run, m)


def cut_preempt(run):
    cut(run, preempt=True)


def cancel(run):
    """Cancelled before the switch, the source goes on; the second attempt succeeds."""
    with run.migration() as m:
        m.start_source()
        m.start_destination("cancelled")
        m.connect()
        m.sent(PART)
        m.source.execute("migrate_cancel")
        # The destination may be gone before the source has noticed its own cancelling: then it
        # calls that a failure.
        m.until_status(m.source, "cancelled", "failed")
        m.destination.end()
        m.verify(m.source)
        m.start_destination()
        m.connect()
        m.sent(PART)
        m.switch()
        finish(run, m)


def dirty_log(run):
    """KVM's slots get dirty logging and lose it again while pages are missing."""
    with run.migration() as m:
        up_to_switch(m)
        m.still_missing()
        m.destination.execute("calc-dirty-rate", calc_time=1, mode="dirty-bitmap")
        m.still_missing()
        m.wait("the dirty rate", lambda: m.destination.execute("query-dirty-rate")["status"] == "measured", m.destination)
        finish(run, m)


def onward(run):
    """What has come by post-copy goes on by pre-copy."""
    with run.migration() as m:
        up_to_switch(m)
        finish(run, m)
        third = m.start("third", incoming=True)
        m.postcopy = False
        m.connect(m.destination, third)
        run.row.update(completed=False, verified=False)
        m.completed(m.destination, third)
        run.row["completed"] = True
        m.verify(third)
        run.row["verified"] = True


def snapshot(run):
    """A background snapshot of what has come by post-copy.

    The guest goes on, and what it writes meanwhile isn't in it.
    """
    with run.migration() as m:
        up_to_switch(m)
        finish(run, m)
        m.source.end()  # its memory is needed
        file = run.setting.sockets / "snapshot"
        m.snapshot(m.destination, file)
        run.row.update(completed=False, verified=False)
        m.verify(m.destination)
        third = m.start("third", incoming=True)
        third.execute("migrate-incoming", uri=f"file:{file}")
        m.until_status(third, "completed")
        run.row["completed"] = True
        m.verify(third)
        run.row["verified"] = True


def precopy(run):
    with run.migration(postcopy=False) as m:
        m.start_source()
        m.start_destination()
        m.connect()
        m.completed()
        run.row.update(completed=True, downtime_ms=m.downtime_ms())
        m.verify(m.destination)
        run.row["verified"] = True
        faults = m.destination.vcpu_faults()
        if faults and faults[1]:
            raise Failed(f"{faults[1]} vCPU faults without post-copy")


def stop_cont(run):
    with run.migration() as m:
        up_to_switch(m)
        slowest = 0
        for _ in range(3):
            m.still_missing()
            slowest = max(slowest, m.destination.qmp.timed("stop", 2))
            status = m.destination.execute("query-status")["status"]
            if status != "paused":
                raise Failed(f"destination: {status} after stop")
            slowest = max(slowest, m.destination.qmp.timed("cont", 2))
        finish(run, m)
        run.note = run.note or f"slowest answer {slowest * 1000:.0f} ms"


def private(run):
    """Memory that only QEMU's mapping can reach: its own path, and one line that says so."""
    run.setting = dataclasses.replace(run.setting, private=True)
    with run.migration() as m:
        up_to_switch(m)
        finish(run, m)
        warnings, faults = m.destination.warnings(), m.destination.vcpu_faults()
        if warnings[:1] == [run.unavailable.get(run.mechanism)]:
            raise Skipped(f"private memory isn't what it is refused for: {warnings[0]}")
        if run.mechanism != "qemu" and len(warnings) != 1 and not (faults and faults[1]):
            raise Failed(f"{len(warnings)} warnings about fault-exits instead of one")


def two_slots(run):
    """q35 with SMM: KVM has two address spaces, with two slots on the same host memory."""
    run.setting = dataclasses.replace(run.setting, machine="q35,smm=on")
    try:
        postcopy(run)
    except Failed as error:
        if "System Management Mode not supported" in str(error):
            raise Skipped(str(error))
        raise


CASES = {
    "postcopy": postcopy,
    "postcopy-preempt": postcopy_preempt,
    "multifd": multifd,
    "recover": recover,
    "cut": cut,
    "cut-preempt": cut_preempt,
    "cancel": cancel,
    "dirty-log": dirty_log,
    "onward": onward,
    "snapshot": snapshot,
    "precopy": precopy,
    "stop-cont": stop_cont,
    "private": private,
    "two-slots": two_slots,
    "migration-test": qtest.postcopy,
}
