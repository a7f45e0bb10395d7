#!/usr/bin/env bash
# The start of all methods: the student reads the data and what the teacher answers, until it makes sense again.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

mkdir -p "$out/mixed"
cat "$out"/{data,pseudo}/train.jsonl >"$out/mixed/train.jsonl"
cp "$out/data/valid.jsonl" "$out/mixed/valid.jsonl"
stage start "student pseudo" "$python" train.py "${train_options[@]}" --method sft --save "$out/start" \
    --model-path "$out/student" --data-dir "$out/mixed" --lr "$START_LR" --lr-decay-style noam \
    --total-iters "$START_STEPS" --eval-interval 50 "$@"
rm -rf "$out/start"/{checkpoints,best_*} # the methods begin at the last
