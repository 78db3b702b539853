# SPDX-License-Identifier: MIT OR Apache-2.0
"""A kernel's name -> its image and modules, from Debian packages."""

import dataclasses
import json
import pathlib
import re
import shutil

from . import cache
from .cache import Unavailable
from .packages import Apt

# name: (the metapackage that follows the series, what its version begins with)
SERIES = {
    # No UFFDIO_POISON (6.6), no KVM_EXIT_MEMORY_FAULT (6.8).
    "stock-6.1": ("linux-image-cloud-amd64", "6.1."),
    "stock-6.12": ("linux-image-6.12-cloud-amd64", "6.12."),
    "newest": ("linux-image-cloud-amd64", ""),
}
# The one whose source our KVM patch applies to: its headers and source must be there in the same
# version.
PATCHED = "stock-6.12"
SOURCE_PACKAGE = "linux-source-6.12"


@dataclasses.dataclass
class Kernel:
    name: str
    release: str  # uname -r
    version: str  # of the Debian packages
    directory: pathlib.Path

    @property
    def image(self):
        return self.directory / "vmlinuz"

    @property
    def modules(self):
        return self.directory / "modules"


def find(name):
    """The kernel of that name; a release as `uname -r` prints it is a name, too."""
    directory = cache.entry(f"kernels/{name}", lambda work: fetch(name, work))
    return Kernel(name, directory=directory, **json.loads((directory / "kernel.json").read_text()))


def fetch(name, work):
    apt = Apt()
    release, version = resolve(apt, name)
    # One package up to Debian 12's kernels; later ones keep the image, the modules and the glue
    # apart.
    for kind in ("image", "binary", "modules"):
        package = f"linux-{kind}-{release}"
        if any(c["Version"] == version for c in apt.candidates(package)):
            apt.unpack(package, version, work / "unpacked")
    unpacked = work / "unpacked"
    images = list(unpacked.rglob("vmlinuz*"))
    kvm = [m for m in unpacked.rglob("kvm.ko*") if release in m.parts]
    if not images or not kvm:
        raise Unavailable(f"the packages of Linux {release} hold no kernel image or no kvm module")
    shutil.move(images[0], work / "vmlinuz")
    shutil.move(next(p for p in kvm[0].parents if p.name == release), work / "modules")
    shutil.rmtree(unpacked)
    (work / "kernel.json").write_text(json.dumps({"release": release, "version": version}))


def resolve(apt, name):
    if name not in SERIES:
        images = apt.candidates(f"linux-image-{name}")
        if not images:
            raise Unavailable(f"no kernel {name}: known are {', '.join(SERIES)} and releases that Debian's mirror has")
        return name, images[0]["Version"]

    metapackage, prefix = SERIES[name]
    for meta in apt.candidates(metapackage):
        depends = re.search(r"linux-image-(\d\S*-cloud-amd64)", meta.get("Depends", ""))
        if not meta["Version"].startswith(prefix) or not depends:
            continue
        release, version = depends[1], meta["Version"]
        wanted = [f"linux-image-{release}"]
        if name == PATCHED:
            wanted += [f"linux-headers-{release}", SOURCE_PACKAGE]
        if all(any(c["Version"] == version for c in apt.candidates(p)) for p in wanted):
            return release, version
    raise Unavailable(f"Debian's mirror offers no {metapackage} {prefix}*: is its security suite configured in /etc/apt?")
