#!/bin/busybox sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# The guest's first process.
#
#   ttyS0      the command's output, and nothing else
#   ttyS1      the kernel's log; our own words go there through /dev/kmsg:
#                kvmfault-vm: running      the machine is up
#                kvmfault-vm: exit N       the command's status
#                kvmfault-vm: failed ...   something here went wrong
/bin/busybox mkdir -p /bin /sbin /usr/bin /usr/sbin
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin:/ HOME=/root TERM=dumb

say() { echo "<2>kvmfault-vm: $*" >/dev/kmsg; }
fail() { say "failed: $*"; poweroff -f; }

mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mkdir -p /dev/shm /dev/pts /dev/hugepages
mount -t tmpfs none /dev/shm
mount -t tmpfs none /tmp
mount -t devpts none /dev/pts
mount -t hugetlbfs none /dev/hugepages
ip link set lo up

# shellcheck source=/dev/null # written for each run
. /run/settings
# Before anything fragments the memory.
echo "$hugepages" >/proc/sys/vm/nr_hugepages
[ "$(cat /proc/sys/vm/nr_hugepages)" = "$hugepages" ] || fail "no $hugepages huge pages: give the guest more memory"

while read -r load; do
	$load 2>/tmp/insmod || fail "$load: $(cat /tmp/insmod)"
done </run/load-modules
[ -e /dev/kvm ] || fail "no /dev/kvm after loading the kvm modules"

cd / || fail "no root"
stty -F /dev/ttyS0 raw -echo
say running
/bin/sh /run/command </dev/null >/dev/ttyS0 2>&1
status=$?
# Waits until the last byte has left, also if the command has left a child that holds the port open.
stty -F /dev/ttyS0 raw -echo
say "exit $status"
poweroff -f
