#!/bin/sh
# Installs what compiling llama.cpp needs and this machine lacks. Says what it does; does nothing where nothing is missing.
set -eu

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
    echo "Compiling llama.cpp needs what this machine does not have:$missing" >&2
    if [ "$(uname)" = Darwin ]; then
        echo "Install it by hand: xcode-select --install && brew install cmake llvm" >&2
        exit 2
    fi
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "Install them by hand with this system's package manager, then try again." >&2
        exit 2
    fi
    sudo=""
    [ "$(id -u)" = 0 ] || sudo=sudo
    echo "Installing now. By hand it is: $sudo apt-get install -y$missing" >&2
    $sudo apt-get update -q >&2
    # shellcheck disable=SC2086 # a list of package names
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -q $missing >&2
fi

if ! command -v cargo >/dev/null 2>&1; then
    echo "Pilotfish is built with Rust; see https://rustup.rs" >&2
    exit 2
fi
