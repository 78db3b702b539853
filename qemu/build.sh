#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# Builds qemu-system-x86_64 from Debian's source and our patches, or takes it from the cache; prints
# its path.
#
#   build.sh                    the patched QEMU; unpatched if there are no patches
#   build.sh --unpatched        Debian's QEMU as it is
#   build.sh --with-tests       its directory, which then holds QEMU's own migration-test as well
#   build.sh --guest            the guest that qemu/test migrates
#
# Exit 122: it can't be had here; stderr says why and what mends it. Exit 123: it should have
# worked.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
"$here/../c-tests/vm/setup" qemu || exit
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$here:$here/../c-tests/vm" exec python3 -m kvmfault_qemu.build "$@"
