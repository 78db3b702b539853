# SPDX-License-Identifier: MIT OR Apache-2.0
"""The "newc" archives that Linux unpacks as its first root.

Documentation/driver-api/early-userspace/buffer-format.rst has the format.
"""

import stat


class Archive:
    def __init__(self):
        self.parts = []
        self.names = set()

    def _add(self, name, mode, data):
        name = name.strip("/")
        if name in self.names:
            return
        self.names.add(name)
        encoded = name.encode() + b"\0"
        ino = len(self.names)
        fields = (ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self.parts += [header, padding(len(header)), data, padding(len(data))]

    def directory(self, name):
        name = name.strip("/")
        if name:
            self._parents(name)
            self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name, data, mode=0o644):
        self._parents(name)
        self._add(name, stat.S_IFREG | mode, data)

    def link(self, name, target):
        self._parents(name)
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def _parents(self, name):
        parents = name.strip("/").split("/")[:-1]
        for i in range(1, len(parents) + 1):
            self._add("/".join(parents[:i]), stat.S_IFDIR | 0o755, b"")

    def write(self, path):
        self._add("TRAILER!!!", 0, b"")
        with open(path, "wb") as out:
            out.writelines(self.parts)


def padding(length):
    return b"\0" * (-length % 4)
