#!/usr/bin/env bash
# KD: GPT-2 large (774M) learns from GPT-2 XL on the texts of the data.
#   bash scripts/gpt2/kd/kd_large.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=8
train kd \
    --model-path gpt2-large \
    --teacher-model-path "${base}checkpoints/gpt2/train/sft/gpt2-xlarge/" \
    --data-dir "${base}processed_data/dolly/full/gpt2/" \
    --save "${base}results/gpt2/train/kd/gpt2-large-xlarge" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 2 --gradient-accumulation-steps 2 --eval-batch-size 8 \
    --lr 0.0001 --epochs 10 \
    "$@"
