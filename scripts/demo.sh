#!/usr/bin/env bash
# From an empty clone to a comparison of SFT, KD and PromptKD on a small scale, in minutes, on a CPU or a GPU:
# results/demo/report.md. Run again, it keeps what is done and goes on where it was stopped.
#
#   bash scripts/demo.sh [--fresh] [options of train.py for the three students, such as --total-iters 600]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=results/demo
if [ "${1:-}" = --fresh ]; then rm -rf "$out" && shift; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" # models this small have no work for more threads
source scripts/stages.sh

sizes=(--max-length 64 --max-prompt-length 48)
train=("$python" train.py "${sizes[@]}" --batch-size 32 --lr-decay-style noam --overwrite)
first=("${train[@]}" --method sft --lr 0.003 --warmup-iters 50 --eval-interval 250)
student=("${train[@]}" --lr 0.002 --warmup-iters 20 --eval-interval 100 --total-iters 400
    --model-path "$out/start/last" --data-dir "$out/data")
teacher=(--teacher-model-path "$out/teacher/last")

stage data "" "$python" tools/make_demo.py --save "$out"
stage teacher data "${first[@]}" --save "$out/teacher" --total-iters 1000 \
    --model-path "$out/models/teacher" --data-dir "$out/teacher_data"
stage start data "${first[@]}" --save "$out/start" --total-iters 300 \
    --model-path "$out/models/student" --data-dir "$out/data"
stage sft start "${student[@]}" --method sft --save "$out/sft" "$@"
stage kd "start teacher" "${student[@]}" --method kd --save "$out/kd" "${teacher[@]}" "$@"
stage promptkd "start teacher" "${student[@]}" --method promptkd --save "$out/promptkd" "${teacher[@]}" "$@"
for model in teacher start sft kd promptkd; do
    stage "eval-$model" "$model" "$python" evaluate.py --model-path "$out/$model/last" --save "$out/$model/eval" \
        --overwrite --data-dir "$out" --data-names test --seeds 10 20 30 40 50 "${sizes[@]}" --no-repeat-ngram-size 0
done
"$python" tools/report.py "$out"/{sft,kd,promptkd} --references "$out"/{teacher,start} --save "$out" \
    --title "The demo: SFT, KD and PromptKD from one start" --samples 12
