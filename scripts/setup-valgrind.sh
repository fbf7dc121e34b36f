#!/bin/sh
# Installs valgrind, for a test of what apps do with Pilotfish in them, where it is missing.
set -eu
# shellcheck source=install.sh
. "$(dirname "$0")/install.sh"

if ! command -v valgrind >/dev/null 2>&1; then
    # It looks into the dynamic linker by the symbols of glibc's package for debugging.
    install_missing "A test of attached apps needs" valgrind libc6-dbg
fi
