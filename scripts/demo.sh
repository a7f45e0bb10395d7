#!/usr/bin/env bash
# From an empty clone to a comparison of methods on a small scale, in minutes, on a CPU or a GPU:
# results/demo/report.md. Run it again to continue where it was stopped: finished stages are kept.
#   bash scripts/demo.sh [--fresh] [options of train.py for the students, such as --total-iters 600]
# Data, teacher, initial student and updates are those of scripts/study/small.yaml. Each method has the learning rate
# that the study chose for it on the dev set (docs/results.md). One training seed cannot rank methods; the study can.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=results/demo
if [ "${1:-}" = --fresh ]; then rm -rf "$out" && shift; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" # models of this size have no work for more threads
source scripts/stages.sh

lengths=(--max-length 40 --max-prompt-length 24)
train() { # NAME "EARLIER STAGES" OPTIONS...
    stage "$1" "$2" "$python" train.py --save "$out/$1" --method sft --data-dir "$out/world/data" --overwrite \
        "${lengths[@]}" --batch-size 32 "${@:3}"
}
first=(--lr-decay-style cosine --no-curves)
stage world "" "$python" -m tools.make_world --save "$out/world"
train teacher world "${first[@]}" --lr 0.003 --warmup-iters 60 --total-iters 1800 --eval-interval 450 --batch-size 64 \
    --model-path "$out/world/models/teacher" --data-dir "$out/world/teacher_data" --max-length 48 --max-prompt-length 34
train start world "${first[@]}" --lr 0.004 --warmup-iters 20 --total-iters 1000 --eval-interval 100 \
    --model-path "$out/world/models/small"

student() { # METHOD LEARNING_RATE OPTIONS...
    train "$1" "start teacher" --method "$1" --lr "$2" --lr-decay-style noam --warmup-iters 10 --total-iters 240 \
        --eval-interval 80 --model-path "$out/start/best_loss" "${@:3}"
}
teacher=(--teacher-model-path "$out/teacher/best_loss")
