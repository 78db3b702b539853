# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's own demand_paging_test, as a peer to compare with."""

import os
import pathlib
import shutil
import subprocess
import sys

from . import cache, kernels, outcome, source
from .cache import Unavailable
from .packages import Apt

PROGRAM = "demand_paging_test"
SOURCES = ["Makefile", "Kbuild", "scripts/", "include/", "arch/Kconfig", "arch/x86/", "usr/include/", "lib/rbtree.c",
           "tools/build/", "tools/scripts/", "tools/include/", "tools/arch/", "tools/lib/", "tools/testing/selftests/"]


def fill(kernel, work):
    apt = Apt()
    if not any(c["Version"] == kernel.version for c in apt.candidates(kernels.SOURCE_PACKAGE)):
        raise Unavailable(f"Debian's mirror has no {kernels.SOURCE_PACKAGE} {kernel.version} any more; "
                          f"remove {kernel.directory} to go on with the current version")
    apt.unpack(kernels.SOURCE_PACKAGE, kernel.version, work / "packages")
    tree, out, log = work / "tree", work / "out", work / "build.log"
    source.extract(work / "packages", SOURCES, tree)
    source.run("make", "-C", tree, "CC=gcc-12", "HOSTCC=gcc-12", "headers", log=log)
    # Static, so that it runs in any guest; its Makefile wants no-pie, which overriding LDFLAGS must
    # keep.
    source.run("make", "-C", tree / "tools/testing/selftests/kvm", f"-j{os.cpu_count()}", "CC=gcc-12",
               "LDFLAGS=-static -pthread -no-pie", f"OUTPUT={out}", out / PROGRAM, log=log)
    shutil.move(out / PROGRAM, work / PROGRAM)
    for directory in (tree, out, work / "packages"):
        shutil.rmtree(directory)


def program():
    """Its path; built if it isn't in the cache."""
    kernel = kernels.find(kernels.PATCHED)
    return cache.entry(f"selftest/{kernel.version}", lambda work: fill(kernel, work)) / PROGRAM


def set_up_and_build():
    """Installs what the build needs, as the `selftest` script does, and builds the selftest."""
    setup = pathlib.Path(__file__).resolve().parent.parent / "setup"
    said = subprocess.run([setup, "selftest"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if said.returncode:
        raise Unavailable(f"the kernel's selftest can't be built here: {said.stderr.strip()}")
    return program()


def main():
    return outcome.exit_status("selftest", lambda: print(program()))


if __name__ == "__main__":
    sys.exit(main())
