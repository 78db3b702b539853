# SPDX-License-Identifier: MIT OR Apache-2.0
"""The guest's file system: busybox, modules, the caller's files and their shared libraries."""

import os
import pathlib
import re
import subprocess

from .cache import Unavailable
from .cpio import Archive

BUSYBOX = "/bin/busybox"
# Flat; first in LD_LIBRARY_PATH after the directories of copied libraries.
LIBRARIES = "/lib/kvmfault-vm"
INIT = (pathlib.Path(__file__).parent / "init.sh").read_bytes()


def build(path, kernel_modules, module_parameters, copies, command, hugepages):
    """Writes the archive.

    copies: [(file or directory here, path there)]; command: words, as for exec.
    """
    archive = Archive()
    for directory in ("dev", "proc", "sys", "tmp", "etc", "root", "run"):
        archive.directory(directory)
    archive.file("bin/busybox", pathlib.Path(BUSYBOX).read_bytes(), 0o755)
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    archive.file("init", INIT, 0o755)

    load = []
    for name, code in kernel_modules:
        archive.file(f"modules/{name}.ko", code)
        load.append(" ".join(["insmod", f"/modules/{name}.ko", *module_parameters.get(name, [])]))
    archive.file("run/load-modules", "\n".join(load).encode() + b"\n")

    library_path = add_files(archive, copies)
    archive.file("run/settings", f"hugepages={hugepages}\nexport LD_LIBRARY_PATH={':'.join(library_path)}\n".encode())
    archive.file("run/command", f"exec {' '.join(map(quoted, command))}\n".encode())
    archive.write(path)


def quoted(word):
    return "'" + word.replace("'", "'\\''") + "'"


def add_files(archive, copies):
    """Adds files, directories and libraries; returns the guest's LD_LIBRARY_PATH."""
    programs = []
    library_path = []
    for source, target in copies:
        source = pathlib.Path(source)
        if not source.exists():
            raise Unavailable(f"{source}: no such file to copy into the guest")
        for file in sorted(source.rglob("*")) if source.is_dir() else [source]:
            there = f"{target}/{file.relative_to(source)}" if source.is_dir() else target
            if file.is_dir():
                archive.directory(there)
                continue
            data = file.read_bytes()
            archive.file(there, data, 0o755 if os.access(file, os.X_OK) else 0o644)
            if data[:4] == b"\x7fELF":
                programs.append(file)
                if ".so" in file.name and os.path.dirname(there) not in library_path:
                    library_path.append(os.path.dirname(there))

    brought_along = {p.name for p in programs}
    for library in libraries(programs):
        if library.name in brought_along:
            continue
        # The loader's path is in the program; the others are found by LD_LIBRARY_PATH.
        target = str(library) if library.name.startswith("ld-linux") else f"{LIBRARIES}/{library.name}"
        archive.file(target, library.read_bytes(), 0o755)
    return library_path + [LIBRARIES]


def libraries(programs):
    found = {}
    together = {str(p.parent.absolute()) for p in programs if ".so" in p.name}
    environment = dict(os.environ, LC_ALL="C")
    environment["LD_LIBRARY_PATH"] = ":".join(sorted(together) + [environment.get("LD_LIBRARY_PATH", "")]).strip(":")
    for program in programs:
        listing = subprocess.run(["ldd", str(program)], env=environment, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
        for line in listing.splitlines():
            if "not found" in line and not any((p.name in line.split()[0]) for p in programs):
                raise Unavailable(f"{program}: {line.strip()}; copy that library into the guest as well")
            path = re.search(r"(/\S+) \(0x", line)
            if path:
                found.setdefault(os.path.basename(path[1]), pathlib.Path(path[1]))
    return found.values()
