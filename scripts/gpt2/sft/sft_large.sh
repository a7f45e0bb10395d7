#!/usr/bin/env bash
# SFT of GPT-2 large (774M).
#   bash scripts/gpt2/sft/sft_large.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=8
train sft \
    --model-path gpt2-large \
    --data-dir "${base}processed_data/dolly/full/gpt2/" \
    --save "${base}results/gpt2/train/sft/gpt2-large" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 2 --gradient-accumulation-steps 2 --eval-batch-size 8 \
    --lr 0.0001 --epochs 10 \
    "$@"
