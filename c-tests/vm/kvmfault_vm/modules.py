# SPDX-License-Identifier: MIT OR Apache-2.0
"""Kernel modules as files: finding, unpacking, and the order of loading."""

import lzma
import re
import subprocess

from .cache import Unavailable


def plain(name):
    return name.replace("-", "_")


def contents(path):
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", path], check=True, stdout=subprocess.PIPE).stdout
    return path.read_bytes()


def loading_order(wanted, *directories):
    """[(name, contents)] of the modules and of what they depend on, dependencies first.

    A module of an earlier directory hides one of the same name in a later directory.
    Dependencies are read from each module itself: ours may differ from those that it hides.
    """
    files = {}
    for directory in reversed(directories):
        files.update({plain(p.name.split(".ko")[0]): p for p in directory.rglob("*.ko*")})

    order = {}

    def add(name):
        if name in order:
            return
        if name not in files:
            raise Unavailable(f"no module {name} in {directories[-1]}")
        code = contents(files[name])
        depends = re.search(rb"\0depends=([^\0]*)\0", code)
        for dependency in depends[1].decode().split(",") if depends else []:
            if dependency and plain(dependency) in files:
                add(plain(dependency))
        order[name] = code

    for name in wanted:
        add(plain(name))
    return list(order.items())
