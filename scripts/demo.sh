#!/usr/bin/env bash
# A whole small experiment on this machine, from an empty clone: data, tokenizer, teacher; SFT, KD and PromptKD students
# from one start; evaluation with five seeds; results/demo/report.md. A stage that was finished is not run again;
# `bash scripts/demo.sh --fresh` starts anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash install.sh
export HF_HUB_OFFLINE=1
out=results/demo
[ "${1:-}" != --fresh ] || rm -rf "$out"
mkdir -p "$out/done"

changed=
stage() { # NAME COMMAND...: run it, unless it was finished with these words and nothing before it has changed
    local name=$1 marker=$out/done/$1
    shift
    if [ -z "$changed" ] && [ "$(cat "$marker" 2>/dev/null)" = "$*" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name"
    changed=yes
    rm -f "$marker"
    .venv/bin/python "$@"
    echo "$*" >"$marker"
}
train() { # METHOD NAME OPTIONS...
    stage "$2" train.py --method "$1" --save "$out/$2" --overwrite --max-length 64 --max-prompt-length 48 \
        --batch-size 32 --lr-decay-style noam "${@:3}"
}

stage data tools/make_demo.py --save "$out/input"
train sft teacher --model-path "$out/input/models/teacher" --data-dir "$out/input/teacher_data" --lr 2e-3 \
    --warmup-iters 50 --total-iters 1000 --eval-interval 250
train sft start --model-path "$out/input/models/student" --data-dir "$out/input/data" --lr 3e-3 \
    --warmup-iters 50 --total-iters 300 --eval-interval 150
from=(--model-path "$out/start/last" --data-dir "$out/input/data" --warmup-iters 20 --total-iters 200 --eval-interval 50)
by=(--teacher-model-path "$out/teacher/last")
train sft sft "${from[@]}" --lr 1e-3
train kd kd "${from[@]}" "${by[@]}" --lr 1e-3
train promptkd promptkd "${from[@]}" "${by[@]}" --lr 1e-3 --teacher-lr 1e-3
for model in teacher start sft kd promptkd; do
    stage "eval_$model" evaluate.py --model-path "$out/$model/last" --data-dir "$out/input/test" --data-names test \
        --seeds 10 20 30 40 50 --max-length 64 --max-prompt-length 48 --save "$out/eval/$model" --overwrite
done
.venv/bin/python tools/report.py --results "$out"/eval/{teacher,start,sft,kd,promptkd} --runs "$out"/{sft,kd,promptkd} \
    --title "Demo: one start, 200 optimizer steps of 32 examples each" --save "$out"
