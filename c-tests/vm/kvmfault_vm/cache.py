# SPDX-License-Identifier: MIT OR Apache-2.0
"""target/vm: everything here can be deleted, and nothing half-written is ever trusted."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
import time

PROJECT = pathlib.Path(__file__).resolve().parents[3]
CACHE = pathlib.Path(os.environ.get("KVMFAULT_VM_CACHE") or PROJECT / "target/vm")

NEEDED = 1 << 30  # free bytes, to fill any entry


class Unavailable(Exception):
    """This machine cannot do it; the message says why and what mends it."""


class Broken(Exception):
    """It should have worked: a bug here, or a kernel that our patch no longer fits.

    Never a reason to skip.
    """


@contextlib.contextmanager
def locked(name):
    """One process at a time fills an entry; the kernel drops the lock if it dies."""
    (CACHE / "locks").mkdir(parents=True, exist_ok=True)
    with open(CACHE / "locks" / name.replace("/", "_"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sweep():
    """Removes what killed processes have left behind."""
    for path in (CACHE / "tmp").iterdir():
        owner = path.name.split("-")[0]
        with contextlib.suppress(OSError):
            if not pathlib.Path("/proc", owner).exists() and time.time() - path.stat().st_mtime > 600:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def scratch(prefix="work-"):
    """A directory for this process alone, gone afterwards."""
    (CACHE / "tmp").mkdir(parents=True, exist_ok=True)
    sweep()
    path = pathlib.Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-{prefix}", dir=CACHE / "tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def entry(name, fill):
    """The directory of a cache entry, made by fill(directory) if it isn't there yet.

    It appears under its name by one rename, complete or not at all.
    """
    path = CACHE / name
    if path.exists():
        return path
    with locked(name):
        if not path.exists():
            free = shutil.disk_usage(CACHE).free
            if free < NEEDED:
                raise Unavailable(f"{free >> 20} MiB free for {CACHE}, {NEEDED >> 20} needed: make room, "
                                  "or set KVMFAULT_VM_CACHE to a directory on another disk")
            with scratch() as work:
                fill(work)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.chmod(work, 0o755)
                os.rename(work, path)
    return path
