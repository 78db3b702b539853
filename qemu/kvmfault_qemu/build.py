# SPDX-License-Identifier: MIT OR Apache-2.0
"""QEMU from Debian's source package and our patches."""

import argparse
import bz2
import filecmp
import hashlib
import os
import pathlib
import re
import shutil
import sys
import tarfile

from kvmfault_vm import cache, outcome, source
from kvmfault_vm.cache import PROJECT, Broken, Unavailable
from kvmfault_vm.packages import Apt

from . import guest

HERE = pathlib.Path(__file__).resolve().parent
PATCHES = HERE.parent / "patches"
STAGE = PROJECT / "target/stage"

SUITES, SECURITY_SUITES = ["trixie", "trixie-updates"], ["trixie-security"]
SERIES = "10.0."  # what the patches apply to

# QEMU 10.0 wants meson 1.5 or newer; Debian 12 has 1.0.
TOOLS = ["meson==1.12.1", "pycotap==1.3.1"]

BINARY = "qemu-system-x86_64"
MIGRATION_TEST = "tests/qtest/migration-test"
CONFIGURE = ["--target-list=x86_64-softmmu", "--without-default-features", "--enable-kvm", "--disable-download",
             # Debian's source has no firmware in binary form, and our guest needs none.
             "--disable-install-blobs", "--disable-debug-info"]


def fetch(work):
    """The upstream part of Debian's source package.

    Debian's own patches are not for what is tested here.
    """
    apt = Apt("apt-source", types="deb-src", suites=SUITES, security_suites=SECURITY_SUITES)
    apt.download_source("qemu", work)
    archives = list(work.glob(f"qemu_{SERIES}*.orig.tar.xz"))
    if len(archives) != 1:
        raise Unavailable(f"Debian's trixie has no source of QEMU {SERIES}x any more, but {[p.name for p in work.iterdir()]}")
    for file in work.iterdir():
        if file not in archives:
            file.unlink()


def make_tools(work):
    log = work / "pip.log"
    try:
        source.run(sys.executable, "-m", "venv", work / "venv", log=log)
        source.run(work / "venv/bin/python3", "-m", "pip", "-q", "install", *TOOLS, log=log)
    except Broken as error:
        raise Unavailable(f"no meson for QEMU's build (from PyPI, by pip): {error}")


def unpack(archive, patches, directory, log):
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, member.name = member.name.partition("/")
            if member.name:
                tar.extract(member, directory)
    for patch in patches:
        source.run("patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-i", patch, cwd=directory, log=log)
    # The build unpacks them even if nothing is installed; Debian's source lacks them.
    names = re.findall(r"'(edk2-\S+\.fd)'", (directory / "pc-bios/meson.build").read_text())
    for name in names:
        (directory / f"pc-bios/{name}.bz2").write_bytes(bz2.compress(b""))


def files_in(directory):
    found = set()
    for parent, directories, names in os.walk(directory):
        names += [name for name in directories if os.path.islink(os.path.join(parent, name))]
        found.update(pathlib.Path(parent, name).relative_to(directory) for name in names)
    return found


def same(a, b):
    if a.is_symlink() or b.is_symlink():
        return a.is_symlink() and b.is_symlink() and os.readlink(a) == os.readlink(b)
    return b.exists() and filecmp.cmp(a, b, shallow=False)


def update(tree, new):
    """Makes `tree` equal to `new`, but leaves alone what is equal.

    What was built from that stays valid.
    """
    wanted = files_in(new)
    for gone in files_in(tree) - wanted if tree.exists() else ():
        (tree / gone).unlink()
    for name in wanted:
        if not same(new / name, tree / name):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).unlink(missing_ok=True)
            shutil.move(new / name, tree / name)
            if not (tree / name).is_symlink():
                os.utime(tree / name)  # archives bring old times


def compile_qemu(archive, patches, tools, targets, work):
    """In a tree that stays, so that another patch doesn't mean building everything again.

    Under one lock; the tree can be deleted.
    """
    tree, log = cache.CACHE / "qemu-tree", work / "build.log"
    with cache.locked("qemu-tree"):
        unpack(archive, patches, work / "new", log)
        update(tree / "source", work / "new")
        shutil.rmtree(work / "new")
        build = tree / "build"
        build.mkdir(exist_ok=True)
        options = [f"--python={tools}/venv/bin/python3", *CONFIGURE]
        if patches:
            # Found at run time where `make stage` puts it, so that a new library needs no new QEMU.
            options += ["--enable-kvmfault", f"--extra-ldflags=-Wl,-rpath,{STAGE}/lib"]
        environment = dict(os.environ, PKG_CONFIG_PATH=f"{STAGE}/lib/pkgconfig")
        source.run(tree / "source/configure", *options, cwd=build, env=environment, log=log)
        source.run("ninja", *targets, cwd=build, env=environment, log=log)
        for target in targets:
            source.run("strip", "-g", "-o", work / os.path.basename(target), build / target, log=log)


def qemu(patched=True, tests=False):
    """The directory that holds the binary (and with `tests` QEMU's migration-test)."""
    patches = sorted(PATCHES.glob("*.patch")) if patched else []
    content = hashlib.sha256()
    if patches:
        header = STAGE / "include/kvmfault.h"
        if not header.exists():
            raise Unavailable(f"the library isn't installed in {STAGE}: run `make stage`")
        content.update(header.read_bytes())
    archive = next(cache.entry("qemu-source/trixie", fetch).glob("*.orig.tar.xz"))
    content.update(f"{archive.name} {tests}".encode())
    for file in [pathlib.Path(__file__), *patches]:
        content.update(file.read_bytes())
    tools = cache.entry(f"qemu-tools/{'-'.join([f'{sys.version_info[0]}.{sys.version_info[1]}', *TOOLS])}", make_tools)
    name = f"qemu/{content.hexdigest()[:16]}"
    if not (cache.CACHE / name).exists():
        print(f"building QEMU ({archive.name.split('.orig')[0]}, {len(patches)} patches); several minutes the first time",
              file=sys.stderr, flush=True)
    targets = [BINARY] + [MIGRATION_TEST] * tests
    return cache.entry(name, lambda work: compile_qemu(archive, patches, tools, targets, work))


def main():
    parser = argparse.ArgumentParser(prog="build.sh")
    parser.add_argument("--unpatched", action="store_true", help="Debian's QEMU as it is")
    parser.add_argument("--with-tests", action="store_true", help="also QEMU's migration-test; prints the directory of both")
    parser.add_argument("--guest", action="store_true", help="the guest that is migrated, not QEMU")
    options = parser.parse_args()

    def build():
        if options.guest:
            return guest.rom()
        directory = qemu(not options.unpatched, options.with_tests)
        return directory if options.with_tests else directory / BINARY
    return outcome.exit_status("build.sh", lambda: print(build()))


if __name__ == "__main__":
    sys.exit(main())
