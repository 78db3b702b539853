# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs programs on Debian's kernels in emulated machines that have nested virtualisation.

    packages   Debian packages, by a private apt configuration
    kernels    a name such as stock-6.12 -> image and modules, cached
    modules    which modules KVM needs, in the order of loading
    cpio       the archive format of an initrd
    initrd     busybox, modules, the caller's programs and their libraries
    machine    one run of QEMU: console in, output and exit status out
    guestlog   what the guest kernel's log says of its health
    command    vm-run
    cases      the lines that a test runner prints
    tier       the whole matrix
    source     compiling parts of the kernel's source
    selftest   the kernel's own test of demand paging
    cache      target/vm
"""
