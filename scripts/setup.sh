#!/bin/sh
# Installs what compiling llama.cpp needs and this machine lacks. Says what it does; does nothing where nothing is missing.
set -eu
# shellcheck source=install.sh
. "$(dirname "$0")/install.sh"

missing=""
command -v cmake >/dev/null 2>&1 || missing="$missing cmake"
command -v c++ >/dev/null 2>&1 || missing="$missing g++"
# bindgen loads libclang while it builds, and needs clang's own headers beside it.
has_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] && return 0
    # Not libclang-cpp, which machines with an LLVM have that have no libclang.
    for library in /usr/lib/llvm-*/lib/libclang.so* /usr/lib/llvm-*/lib/libclang-[0-9]*.so* /usr/lib/*/libclang.so* \
        /usr/lib/*/libclang-[0-9]*.so* /usr/lib64/libclang.so* /usr/lib64/libclang-[0-9]*.so* \
        /Library/Developer/CommandLineTools/usr/lib/libclang.dylib /opt/homebrew/opt/llvm/lib/libclang.dylib; do
        # A pattern that nothing matches stands for itself.
        [ -e "$library" ] && return 0
    done
    return 1
}
has_libclang || missing="$missing libclang-dev"

if [ -n "$missing" ]; then
    if [ "$(uname)" = Darwin ]; then
        echo "Compiling llama.cpp needs what this machine does not have:$missing" >&2
        echo "Install it by hand: xcode-select --install && brew install cmake llvm" >&2
        exit 2
    fi
    # shellcheck disable=SC2086 # a list of package names
    install_missing "Compiling llama.cpp needs" $missing
fi

if ! command -v cargo >/dev/null 2>&1; then
    echo "Pilotfish is built with Rust; see https://rustup.rs" >&2
    exit 2
fi
