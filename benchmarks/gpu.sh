#!/usr/bin/env bash
# bash benchmarks/gpu.sh [PART...]: check and measure this project on one GPU, and print one table last.
#
# Parts: tests, decoding, losses, steps, trl (default: all). They take 9 minutes at most and need no network.
# Needs python3 (or $PYTHON) with torch, transformers, peft and pytest. Folder $WHEELS (default: .whl) may hold wheels
# of what is missing: deepspeed, rouge-score, nltk, pydantic, ...; and of what is optional: bitsandbytes, trl.
# $OUT (default: results/gpu) gets the logs, table.md and rows.jsonl.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3} OUT=$(realpath -m "${OUT:-results/gpu}") WHEELS=${WHEELS:-.whl}
parts=("$@")
[ $# -gt 0 ] || parts=(tests decoding losses steps trl)
for part in "${parts[@]}"; do
    [[ " tests decoding losses steps trl " == *" $part "* ]] ||
        { echo "gpu.sh: error: unknown part $part: use tests, decoding, losses, steps or trl" >&2 && exit 2; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT"
rm -f "$OUT/rows.jsonl" "$OUT/tests.log"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
if ls "$WHEELS"/*.whl >/dev/null 2>&1; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

steps=("$PYTHON" benchmarks/gpu_steps.py --rows "$OUT/rows.jsonl" --work "$work")
limited() { # limited SECONDS NAME COMMAND...: its output goes to a log, of which the last lines are shown
    local limit=$1 name=$2 began=$SECONDS status=0
    shift 2
    timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || status=$?
    echo "$name: status $status after $((SECONDS - began)) s"
    [ "$status" -eq 0 ] || grep -v '^\s*$' "$OUT/$name.log" | tail -n 15
}

for part in "${parts[@]}"; do
    case $part in
    tests) limited 170 tests env PROMPTKD_TEST_DEVICE=cuda OMP_NUM_THREADS=1 \
        "$PYTHON" -m pytest -p no:cacheprovider --tb=short -v -n "${WORKERS:-6}" tests/gpu ;;
    decoding) limited 100 decoding "$PYTHON" benchmarks/gpu_decoding.py --rows "$OUT/rows.jsonl" ;;
    losses) limited 40 losses "$PYTHON" benchmarks/gpu_losses.py --rows "$OUT/rows.jsonl" ;;
    steps) limited 150 steps "${steps[@]}" ;;
    trl) limited 70 trl "${steps[@]}" --trl --pairs gpt2-base:gpt2-xlarge:bf16 ;;
    esac
done
"$PYTHON" benchmarks/gpu_table.py "$OUT/rows.jsonl" "$OUT/tests.log" --markdown "$OUT/table.md"
