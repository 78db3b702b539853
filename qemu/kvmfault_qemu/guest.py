# SPDX-License-Identifier: MIT OR Apache-2.0
"""The guest of qemu/guest, as a ROM that takes the place of QEMU's firmware."""

import hashlib
import pathlib

from kvmfault_vm import cache, source

GUEST = pathlib.Path(__file__).resolve().parent.parent / "guest"
FLAGS = ["-m64", "-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-pic",
         # Nothing that needs more than a stack: no red zone, no vector registers, no calls to a
         # libc.
         "-mno-red-zone", "-mgeneral-regs-only", "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables",
         "-fno-tree-loop-distribute-patterns", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments"]


def make(work):
    log = work / "build.log"
    source.run("cc", *FLAGS, f"-Wl,-T,{GUEST}/guest.ld", "-o", work / "guest.elf", GUEST / "start.S", GUEST / "guest.c", log=log)
    source.run("objcopy", "-O", "binary", work / "guest.elf", work / "guest.bin", log=log)


def rom():
    """Its path; built if it isn't in the cache."""
    content = hashlib.sha256(" ".join(FLAGS).encode())
    for file in sorted(GUEST.iterdir()):
        content.update(file.read_bytes())
    return cache.entry(f"qemu-guest/{content.hexdigest()[:16]}", make) / "guest.bin"
