# SPDX-License-Identifier: MIT OR Apache-2.0
"""Builds the two KVM modules out of tree: Debian's source and our patch, with Debian's headers.

All three are of one version, and come from packages unpacked in the cache; the machine's own kernel
and headers are not used.
"""

import argparse
import hashlib
import os
import pathlib
import subprocess
import sys

from kvmfault_vm import cache, kernels, outcome, source
from kvmfault_vm.cache import Broken, Unavailable
from kvmfault_vm.packages import Apt

HERE = pathlib.Path(__file__).resolve().parent
SOURCES = ["arch/x86/kvm/", "virt/kvm/", "include/linux/kvm_host.h", "include/uapi/linux/kvm.h"]

# KVM's Makefile expects to be in the kernel's tree: its sources lie there, while $(srctree) has
# only headers. NOSTDINC_FLAGS come first of all include paths, so that the patched headers hide
# Debian's.
OUT_OF_TREE = [
    ("include $(srctree)/virt/kvm/Makefile.kvm", "include $(src)/../../../virt/kvm/Makefile.kvm"),
    ("ccflags-y += -I $(srctree)/arch/x86/kvm",
     "NOSTDINC_FLAGS += -I$(src)/../../../include -I$(src)/../../../include/uapi\n"
     # The last is for <trace/define_trace.h>, which includes ../../arch/x86/kvm/trace.h.
     "ccflags-y += -I $(src) -I $(src)/../../../virt/kvm -I $(src)/../../../include/trace"),
]


def fetch(kernel, work):
    """Fetches headers, kbuild and KVM's part of the source, all of the kernel's own version."""
    apt = Apt()
    common = kernel.release.replace("-cloud-amd64", "-common")
    kbuild = f"linux-kbuild-{kernel.release.replace('-cloud-amd64', '')}"
    wanted = [f"linux-headers-{kernel.release}", f"linux-headers-{common}", kbuild, kernels.SOURCE_PACKAGE]
    for package in wanted:
        if not any(c["Version"] == kernel.version for c in apt.candidates(package)):
            raise Unavailable(f"Debian's mirror has no {package} {kernel.version} any more; "
                              f"remove {kernel.directory} to go on with the current version")
        apt.unpack(package, kernel.version, work / "packages")
    source.extract(work / "packages", SOURCES, work / "source")


def compile_modules(kernel, origin, patches, work):
    tree, log = work / "tree", work / "build.log"
    subprocess.run(["cp", "-r", origin / "source", tree], check=True)
    (tree / "include/trace").mkdir()
    for patch in patches:
        source.run("patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-i", patch, cwd=tree, log=log)

    makefile = tree / "arch/x86/kvm/Makefile"
    text = makefile.read_text()
    for old, new in OUT_OF_TREE:
        if text.count(old) != 1:
            raise Broken(f"{makefile.name}: expected one line {old!r}")
        text = text.replace(old, new)
    makefile.write_text(text)

    # Debian's headers find each other by absolute path; ours are unpacked elsewhere.
    headers = origin / f"packages/usr/src/linux-headers-{kernel.release}"
    top = headers.with_name(headers.name.replace("-cloud-amd64", "-common")) / "Makefile"
    (tree / "headers.mk").write_text(f"include {top}\n")
    # Without BTF: it needs pahole, and nothing here reads it.
    source.run("make", "-C", headers, "-f", tree / "headers.mk", f"M={tree}/arch/x86/kvm", f"-j{os.cpu_count()}",
        "CONFIG_KVM=m", "CONFIG_KVM_X86=m", "CONFIG_KVM_AMD=m", "CONFIG_KVM_INTEL=n", "CONFIG_DEBUG_INFO_BTF_MODULES=",
        "modules", log=log)
    for module in ("kvm.ko", "kvm-amd.ko"):
        source.run("strip", "-g", "-o", work / module, tree / "arch/x86/kvm" / module, log=log)
    subprocess.run(["rm", "-rf", tree], check=True)


def modules(patches):
    """Their directory."""
    kernel = kernels.find(kernels.PATCHED)
    content = hashlib.sha256(kernel.version.encode())
    for file in [pathlib.Path(__file__), *patches]:
        content.update(file.read_bytes())
    name = f"kvm/{content.hexdigest()[:16]}"
    if not (cache.CACHE / name).exists():
        print(f"building kvm.ko and kvm-amd.ko of Linux {kernel.release} with our patch (about half a minute)",
              file=sys.stderr, flush=True)
    origin = cache.entry(f"kvm-source/{kernel.version}", lambda work: fetch(kernel, work))
    return cache.entry(name, lambda work: compile_modules(kernel, origin, patches, work))


def main():
    parser = argparse.ArgumentParser(prog="build")
    parser.add_argument("--with", action="append", default=[], dest="further", metavar="PATCH", type=pathlib.Path)
    patches = sorted(HERE.glob("*.patch")) + [p.resolve() for p in parser.parse_args().further]
    return outcome.exit_status("build", lambda: print(modules(patches)))


if __name__ == "__main__":
    sys.exit(main())
