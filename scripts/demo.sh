#!/usr/bin/env bash
# From an empty clone to a comparison of SFT, KD and PromptKD on a small scale, in minutes, on a CPU or a GPU:
# results/demo/report.md. Run again, it keeps what is done and goes on where it was stopped.
#
#   bash scripts/demo.sh [--fresh] [options of train.py for the three students, such as --total-iters 600]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=results/demo
if [ "${1:-}" = --fresh ]; then
    rm -rf "$out"
    shift
fi
bash install.sh

unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" # models this small gain nothing from more
did=$(cat tools/make_demo.py)

stage() { # NAME COMMAND...: runs the command unless it is done, after the same commands as now
    local name=$1 marker=$out/done/$1 began=$SECONDS
    shift
    did=$(printf '%s\n%s' "$did" "$*" | cksum)
    if [ "$(cat "$marker" 2>/dev/null)" = "$did" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $*"
    rm -f "$marker"
    .venv/bin/python "$@"
    mkdir -p "$out/done"
    echo "$did" >"$marker"
    echo "== $name: $((SECONDS - began)) s"
}

length=(--max-length 64 --max-prompt-length 48)
train=(train.py "${length[@]}" --batch-size 32 --lr-decay-style noam --eval-interval 100 --overwrite)
student=(--data-dir "$out/data" --model-path "$out/start/last" --lr 0.002 --warmup-iters 20 --total-iters 400)
teacher=(--teacher-model-path "$out/teacher/last")

stage data tools/make_demo.py --save "$out"
stage teacher "${train[@]}" --method sft --save "$out/teacher" --model-path "$out/models/teacher" \
    --data-dir "$out/teacher_data" --lr 0.002 --warmup-iters 50 --total-iters 1200
stage start "${train[@]}" --method sft --save "$out/start" --model-path "$out/models/student" \
    --data-dir "$out/data" --lr 0.003 --warmup-iters 50 --total-iters 300
stage sft "${train[@]}" --method sft --save "$out/sft" "${student[@]}" "$@"
stage kd "${train[@]}" --method kd --save "$out/kd" "${student[@]}" "${teacher[@]}" "$@"
stage promptkd "${train[@]}" --method promptkd --save "$out/promptkd" "${student[@]}" "${teacher[@]}" "$@"
for model in teacher start sft kd promptkd; do
    stage "eval-$model" evaluate.py --model-path "$out/$model/best_rougeL" --save "$out/$model/eval" --overwrite \
        --data-dir "$out" --data-names test --seeds 10 20 30 40 50 "${length[@]}" --no-repeat-ngram-size 0
done
.venv/bin/python tools/report.py "$out"/{sft,kd,promptkd} --references "$out"/{teacher,start} --save "$out" \
    --title "The demo: SFT, KD and PromptKD from one start"
