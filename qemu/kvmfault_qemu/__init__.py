# SPDX-License-Identifier: MIT OR Apache-2.0
"""Migrates a guest between two QEMUs, ours and Debian's, and looks at what became of it.

    build      QEMU from Debian's source package and our patches, cached
    guest      the program that is migrated
    qmp        talking to a QEMU
    process    one QEMU with our guest in it
    serial     what the guest says, and the times that it measured
    migration  a source, a destination and a connection between them
    cases      what is done to them
    qtest      QEMU's own migration-test
    report     the lines, the totals and the JSON
    test       qemu/test
    python     a Python for machines that have none
    tier       qemu/tier: qemu/test in the emulated machines of c-tests/vm
"""
