#!/bin/sh
# What a guard costs as the model grows, as hook points grow, and as sequences grow: writes models of random weights into FOLDER (11 GiB in all),
# times guards made up for them, and prints tables for docs/performance.md.
#
#   benches/scale.sh FOLDER > scale.md
#
# PAIRS         pairs of runs, guarded and not, a figure is made of (4)
# PROMPT        tokens of the prompt (64)
# TOKENS        tokens decoded after it (16)
# BIG_PAIRS, BIG_PROMPT, BIG_TOKENS
#               the same for models above 3 GB, which take longest (2, 32, 8)
# MODELS        names of those to time, of the list below (all)
# SEQUENCE_MODEL
#               the model that many sequences are timed on (llama-1b)
# SEQUENCES     how many, one number after the other (1 4 8 16)
# INTERVENTIONS kinds of guards (gated-add add autoencoder)
# POINTS        numbers of hook points (1 3 all)
# PILOTFISH     the command (target/debug/pilotfish)
#
# Autoencoders at all hook points of llama-3b and llama-8b are left out: they would be 2 and 4 GiB.
set -eu
# Decimal points.
LC_ALL=C
export LC_ALL

[ $# -eq 1 ] || { sed -n '2,22s/^# \{0,1\}//p' "$0" >&2; exit 64; }
folder=$1
pilotfish=${PILOTFISH:-target/debug/pilotfish}
mkdir -p "$folder"

# Name, preset, and what is otherwise: first the same width ever deeper, then ever larger models.
LIST='
1024x8 qwen3-0.6b --layers 8 --architecture llama --vocabulary 32000
1024x32 qwen3-0.6b --layers 32 --architecture llama --vocabulary 32000
2048x8 llama-1b --layers 8
llama-1b llama-1b
2048x32 llama-1b --layers 32
smollm2-135m smollm2-135m
qwen3-0.6b qwen3-0.6b
gemma3-1b gemma3-1b
llama-3b llama-3b
llama-8b llama-8b
'
names=$(echo "$LIST" | awk 'NF { print $1 }')
models=${MODELS:-$names}

write() {
    [ -e "$folder/$1.gguf" ] && return
    options=$(echo "$LIST" | awk -v name="$1" '$1 == name { sub($1 FS, ""); print }')
    [ -n "$options" ] || { echo "no model is called $1; known are" $names >&2; exit 64; }
    # The options are words.
    # shellcheck disable=SC2086
    "$pilotfish" models synthesize --preset $options --quantization q4_k_m -o "$folder/$1.gguf" > /dev/null
}

# number JSON KEY N: the Nth number called KEY.
number() {
    echo "$1" | tr ',{' '\n\n' | sed -n "s/^\"$2\":\(.*[0-9]\).*/\1/p" | sed -n "$3p"
}

# Speeds and ratios of one bench, as cells of a table.
cells() {
    json=$("$pilotfish" bench --json "$@")
    for phase in 1 2; do
        ratio=$(number "$json" ratio $phase)
        spread=$(echo "$json" | grep -o '"spread":\[[^]]*\]' | sed -n "${phase}s/.*\[\(.*\),\(.*\)\]/\1 \2/p")
        speed=$(number "$json" unguarded $phase)
        # shellcheck disable=SC2086
        printf ' %.1f | %.3f (%.3f – %.3f) |' "$speed" "$ratio" $spread
    done
    echo
}

size() {
    wc -c < "$folder/$1.gguf"
}

# Pairs, and tokens of prompt and answer, as suits the model's size.
effort() {
    if [ "$(size "$1")" -ge 3000000000 ]; then
        echo --pairs "${BIG_PAIRS:-2}" --prompt-tokens "${BIG_PROMPT:-32}" --tokens "${BIG_TOKENS:-8}"
    else
        echo --pairs "${PAIRS:-4}" --prompt-tokens "${PROMPT:-64}" --tokens "${TOKENS:-16}"
    fi
}

HEAD='prefill, tokens per second | ratio | decode, tokens per second | ratio |'

echo '### As the model and the hook points grow'
echo
echo "| model | GiB | guard | hook points | $HEAD"
echo '|---|---|---|---|---|---|---|---|'
for model in $models; do
    write "$model"
    for kind in ${INTERVENTIONS:-gated-add add autoencoder}; do
        for points in ${POINTS:-1 3 all}; do
            case $kind-$points-$model in
                autoencoder-all-llama-3b | autoencoder-all-llama-8b) continue ;;
            esac
            printf '| %s | %.2f | `%s` | %s |' "$model" "$(size "$model" | awk '{ print $1 / 2^30 }')" "$kind" "$points"
            # shellcheck disable=SC2046
            cells --model "$folder/$model.gguf" --intervention "$kind" --points "$points" $(effort "$model")
        done
    done
done

model=${SEQUENCE_MODEL:-llama-1b}
write "$model"
echo
echo "### As sequences grow"
echo
echo "On $model, all sequences' tokens together."
echo
echo "| guard | hook points | sequences | $HEAD"
echo '|---|---|---|---|---|---|---|'
for kind in ${INTERVENTIONS:-gated-add add autoencoder}; do
    for sequences in ${SEQUENCES:-1 4 8 16}; do
        printf '| `%s` | 3 | %s |' "$kind" "$sequences"
        # shellcheck disable=SC2046
        cells --model "$folder/$model.gguf" --intervention "$kind" --points 3 --sequences "$sequences" $(effort "$model")
    done
done
