# SPDX-License-Identifier: MIT OR Apache-2.0
"""Compiling parts of Debian's kernel source."""

import subprocess
import tarfile

from .cache import Broken, Unavailable


def extract(packages, prefixes, destination):
    """Extracts the files that begin with a prefix from the source package's tar.

    The tar lies below `packages`, and is removed here.
    """
    archive = next(packages.rglob("linux-source-*.tar.xz"))
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("/")
            if any(name.startswith(p) for p in prefixes) and (member.isfile() or member.issym()):
                member.name = name
                tar.extract(member, destination)
    archive.unlink()


def run(*command, log, **options):
    """One step of a build; its output goes to the log, and the log's end into the error."""
    with open(log, "a") as out:
        print("+", *command, file=out, flush=True)
        # If we are interrupted, or even killed, the step ends too: make stops its own children.
        step = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", "--", *map(str, command)], stdin=subprocess.DEVNULL,
                                stdout=out, stderr=subprocess.STDOUT, **options)
        try:
            status = step.wait()
        finally:
            step.terminate()
            step.wait()
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        kind = Unavailable if "No space left on device" in tail else Broken
        raise kind(f"{' '.join(map(str, command))} failed; the last lines:\n{tail}")
