#!/bin/sh
# Installs valgrind and pkg-config, for tests of what apps do with Pilotfish in them, where they are missing.
set -eu
# shellcheck source=install.sh
. "$(dirname "$0")/install.sh"

if ! command -v pkg-config >/dev/null 2>&1; then
    install_missing "A test of what \`make install\` does needs" pkg-config
fi
if ! command -v valgrind >/dev/null 2>&1; then
    # It looks into the dynamic linker by the symbols of glibc's package for debugging.
    install_missing "A test of attached apps needs" valgrind libc6-dbg
fi
