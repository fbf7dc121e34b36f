#!/bin/sh
# Puts the numpy that tests/reference/ is written for into FOLDER, for PYTHONPATH: not into the system's Python, and with no virtual environment,
# which not every Python can make. Does nothing where it is there.
#
# usage: setup-reference.sh FOLDER
set -eu
folder=$1
requirements=$(dirname "$0")/../tests/reference/requirements.txt
python=${PILOTFISH_PYTHON:-python3}

if [ -e "$folder/requirements.txt" ] && cmp -s "$requirements" "$folder/requirements.txt" &&
    PYTHONPATH=$folder "$python" -c "import numpy" 2>/dev/null; then
    exit 0
fi
if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "The Python reference needs pip, which \`$python\` does not have." >&2
    echo "Install it (Debian and Ubuntu: python3-pip), or name a Python that has it with PILOTFISH_PYTHON." >&2
    exit 2
fi
echo "Fetching $(cat "$requirements") into $folder" >&2
rm -rf "$folder"
"$python" -m pip install --quiet --disable-pip-version-check --no-input --only-binary :all: --target "$folder" -r "$requirements"
cp "$requirements" "$folder/requirements.txt"
