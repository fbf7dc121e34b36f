#!/bin/sh
# Ridge regressions between layers, beside the same in numpy, in turn; prints each run's seconds and the median of the ratios.
#
#   benches/mapping.sh pairs|wide [PAIRS]
#
# PYTHON   a Python that has numpy (python3)
# SCALE    part of the rows, from 0 to 1 (1)
set -eu
LC_ALL=C
export LC_ALL

shape=${1:?pairs or wide}
pairs=${2:-3}
python=${PYTHON:-python3}
here=$(dirname "$0")

cargo bench --profile dev --bench mapping --no-run 2> /dev/null
seconds() {
    "$@" | tee /dev/stderr | cut -d ' ' -f 1
}
ratios=$(
    i=0
    while [ $i -lt "$pairs" ]; do
        ours=$(seconds cargo bench --quiet --profile dev --bench mapping -- "$shape")
        theirs=$(seconds "$python" "$here/peers/numpy_ridge.py" "$shape")
        echo "$ours $theirs" | awk '{ print $1 / $2 }'
        i=$((i + 1))
    done
)
echo "load: $(cat /proc/loadavg)"
echo "$ratios" | sort -n | awk '{ r[NR] = $1 } END { m = (NR % 2) ? r[(NR + 1) / 2] : (r[NR / 2] + r[NR / 2 + 1]) / 2
    printf "time over numpy'"'"'s: median %.2f (%.2f to %.2f) of %d pairs\n", m, r[1], r[NR], NR }'
