# SPDX-License-Identifier: MIT OR Apache-2.0
"""A Python for machines that have none: Debian's, without what loads shared libraries."""

import shutil

from kvmfault_vm import cache
from kvmfault_vm.cache import Unavailable
from kvmfault_vm.packages import Apt

VERSION = "3.11"  # bookworm's
PACKAGES = [f"python{VERSION}-minimal", f"libpython{VERSION}-minimal", f"libpython{VERSION}-stdlib"]
PROGRAM = f"/usr/bin/python{VERSION}"
NOT_NEEDED = ["lib2to3", "distutils", "ensurepip", "pydoc_data", "unittest", "asyncio", "sqlite3", "tkinter", "wsgiref", "xmlrpc"]


def fill(work):
    apt = Apt()
    for package in PACKAGES:
        versions = apt.candidates(package)
        if not versions:
            raise Unavailable(f"Debian's mirror has no {package}")
        apt.unpack(package, versions[0]["Version"], work)
    library = work / f"usr/lib/python{VERSION}"
    for name in NOT_NEEDED:
        shutil.rmtree(library / name, ignore_errors=True)
    # The directory itself is looked for at every start.
    for module in (library / "lib-dynload").iterdir():
        module.unlink()


def copies():
    """[(here, there)] for an initrd."""
    here = cache.entry(f"qemu-python/{VERSION}-without-dynload", fill)
    library = f"usr/lib/python{VERSION}"
    return [(here / PROGRAM[1:], PROGRAM), (here / library, f"/{library}")]
