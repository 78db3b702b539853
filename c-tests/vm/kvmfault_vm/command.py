# SPDX-License-Identifier: MIT OR Apache-2.0
"""vm-run: one command in one machine."""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys

from . import cache, initrd, kernels, machine, modules
from .cache import PROJECT, Broken, Unavailable

GUEST_FAILED = 120
TIMED_OUT = 121
UNAVAILABLE = 122
BROKEN = 123
ABIS = ("v2", "v3", "v4", "v7", "userfault", "none", "falsefriend")

EPILOG = f"""
exit status: that of COMMAND, except
  {GUEST_FAILED}  the guest kernel panicked, oopsed, warned, locked up or stalled, or the guest could not be set up
  {TIMED_OUT}  no end within --timeout
  {UNAVAILABLE}  not possible on this machine; the message says why and what mends it
  {BROKEN}  our KVM patch doesn't apply or compile
Each comes with a line on stderr; the first two name the guest kernel's log.
"""


def parser():
    p = argparse.ArgumentParser(prog="vm-run", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
                                description="Runs COMMAND as root on a Debian kernel, in an emulated machine with KVM inside.")
    p.add_argument("--kernel", default="stock-6.12", metavar="NAME",
                   help=f"{', '.join(kernels.SERIES)}, or a release as `uname -r` prints it (default: stock-6.12)")
    p.add_argument("--abi", choices=ABIS, help=f"our patched KVM modules (for {kernels.PATCHED}) with this kvm.fault_abi")
    p.add_argument("--modules", metavar="DIR", help="kvm.ko and kvm-amd.ko from DIR, for trying a KVM that is broken on purpose")
    p.add_argument("--hugepages", type=int, default=0, metavar="N", help="2 MiB pages, mounted at /dev/hugepages")
    p.add_argument("--smp", type=int, default=2, metavar="N")
    p.add_argument("--memory", default="2048", metavar="M", help="MiB, or with a suffix as QEMU takes it (default: 2048)")
    p.add_argument("--timeout", type=float, default=300, metavar="S", help="seconds for boot and command (default: 300)")
    p.add_argument("--append", default="", metavar="TEXT", help="more kernel parameters")
    p.add_argument("--module-parameter", action="append", default=[], metavar="MODULE.NAME=VALUE",
                   help="for example kvm_amd.npt=0, which makes KVM use shadow paging")
    p.add_argument("--copy", action="append", default=[], metavar="FILE[:DEST]",
                   help="a file or directory for the guest (default DEST: /NAME); a program brings its shared libraries")
    p.add_argument("-v", "--verbose", action="store_true", help="say which kernel, how long and where the log is")
    p.add_argument("command", nargs="+", metavar="COMMAND", help="after --; found in / and in busybox")
    return p


def copies(words):
    """--copy's FILE[:DEST] -> [(file here, path there)]"""
    split = [word.partition(":") for word in words]
    return [(source, target or "/" + os.path.basename(os.path.abspath(source))) for source, _, target in split]


def build_modules(kernel_name):
    """The directory of our patched kvm.ko and kvm-amd.ko."""
    if kernel_name != kernels.PATCHED:
        raise Unavailable(f"--abi: the KVM patch is for --kernel {kernels.PATCHED}, not for {kernel_name}")
    build = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", "--", PROJECT / "c-tests/kernel/build"],
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        directory = build.communicate()[0].strip()
    finally:
        build.terminate()
        build.wait()
    if build.returncode:
        raise (Unavailable if build.returncode == UNAVAILABLE else Broken)("the patched KVM modules could not be built (see above)")
    return directory


def run(kernel, command, files, *, abi=None, module_directory=None, hugepages=0, smp=2, memory="2048",
        timeout=300, silence=None, append="", module_parameters=(), output):
    """Boots a kernel (kernels.Kernel) for one command; returns a machine.Outcome."""
    directories = [kernel.modules]
    if abi and not module_directory:
        module_directory = build_modules(kernel.name)
    if module_directory:
        directories.insert(0, pathlib.Path(module_directory))
    parameters = {"kvm": [f"fault_abi={abi}"]} if abi else {}
    for parameter in module_parameters:
        module, _, setting = parameter.partition(".")
        parameters.setdefault(modules.plain(module), []).append(setting)
    with cache.scratch("run-") as work:
        initrd.build(work / "initrd", modules.loading_order(["kvm", "kvm_amd"], *directories), parameters, files,
                     command, hugepages)
        return machine.boot(kernel, work / "initrd", label=f"{kernel.name}-{abi or 'stock'}", smp=smp, memory=memory,
                            timeout=timeout, silence=silence, append=append, output=output)


def main():
    arguments = parser().parse_args()
    machine.die_cleanly()

    def output(data):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def complain(text):
        print(f"vm-run: {text}", file=sys.stderr, flush=True)

    try:
        kernel = kernels.find(arguments.kernel)
        outcome = run(kernel, arguments.command, copies(arguments.copy), abi=arguments.abi, module_directory=arguments.modules,
                      hugepages=arguments.hugepages, smp=arguments.smp, memory=arguments.memory,
                      timeout=arguments.timeout, append=arguments.append,
                      module_parameters=arguments.module_parameter, output=output)
    except Unavailable as error:
        complain(error)
        return UNAVAILABLE
    except Broken as error:
        complain(f"FAILED: {error}")
        return BROKEN
    except OSError as error:
        if error.errno is None:
            raise
        free = shutil.disk_usage(cache.PROJECT).free // (1 << 20)
        complain(f"{error} ({free} MiB free on this disk; the cache is {cache.CACHE})")
        return UNAVAILABLE
    except machine.Interrupted as error:
        complain(f"interrupted by {error}")
        return 128 + 15

    if arguments.verbose or outcome.problem:
        complain(f"Linux {kernel.release}, {outcome.seconds:.1f} s")
    if outcome.problem:
        complain(f"FAILED: {outcome.problem}; log: {outcome.log}")
        return TIMED_OUT if outcome.timed_out else GUEST_FAILED
    if arguments.verbose:
        complain(f"log: {outcome.log}")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
