#!/bin/sh
# Installs llama-cpp-python into FOLDER, for tests: a Python environment in FOLDER/venv, with the package as it is in its source distribution. Its own llama.cpp is
# not compiled: it loads the shared libraries of the very same one, which `make llama-server` builds, by LLAMA_CPP_LIB_PATH. Does nothing where it is there.
#
# usage: setup-llama-cpp-python.sh FOLDER
set -eu
# shellcheck source=install.sh
. "$(dirname "$0")/install.sh"

# Whose structs are those of the llama.cpp that Cargo.toml pins.
VERSION=0.3.36
SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e

mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=${PILOTFISH_PYTHON:-python3}
if [ "$(cat "$folder/installed" 2>/dev/null)" = "$SHA256" ]; then
    exit 0
fi

if ! "$python" -c "import ensurepip, venv" >/dev/null 2>&1; then
    install_missing "llama-cpp-python needs" python3-venv
fi
echo "Fetching llama-cpp-python $VERSION from PyPI into $folder" >&2
rm -rf "$folder/installed" "$folder/venv" "$folder/download"
"$python" -m venv "$folder/venv"
# What it needs to run.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-input "numpy<3" "jinja2<4" "diskcache<6" "typing-extensions<5"
mkdir "$folder/download"
# pip compares the hash before it runs anything of the package.
echo "llama-cpp-python==$VERSION --hash=sha256:$SHA256" >"$folder/download/requirements.txt"
"$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-input --no-deps --no-binary llama-cpp-python --require-hashes \
    --dest "$folder/download" -r "$folder/download/requirements.txt"
site=$("$folder/venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
tar -xzf "$folder/download"/*.tar.gz -C "$site" --strip-components 1 "llama_cpp_python-$VERSION/llama_cpp"
rm -rf "$folder/download"
echo "$SHA256" >"$folder/installed"
