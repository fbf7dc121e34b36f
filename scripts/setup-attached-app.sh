#!/bin/sh
# Installs node-llama-cpp, as its makers built it, into FOLDER/node_modules: the app of tests/suite/attach.rs. Does nothing where it is there.
#
# usage: setup-attached-app.sh FOLDER
set -eu
# shellcheck source=install.sh
. "$(dirname "$0")/install.sh"

lock=$(cd "$(dirname "$0")/../tests/attach" && pwd)
mkdir -p "$1"
cd "$1"
if cmp -s "$lock/package-lock.json" installed.json; then
    exit 0
fi

if ! command -v npm >/dev/null 2>&1; then
    install_missing "The app that guards are attached to in tests needs" nodejs npm
fi
major=$(node --version | sed 's/^v\([0-9]*\).*/\1/')
if [ "$major" -lt 20 ]; then
    echo "node-llama-cpp needs Node.js 20 or newer, and this is $(node --version)." >&2
    exit 2
fi
cp "$lock/package.json" "$lock/package-lock.json" .
# Its own script would look for builds of other machines, or make one.
npm ci --ignore-scripts --omit=optional --no-audit --no-fund >&2
cp package-lock.json installed.json
