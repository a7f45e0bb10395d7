#!/usr/bin/env bash
# PromptKD: GPT-2 medium (355M) learns from GPT-2 XL, whose prompt is tuned to the student.
#   bash scripts/gpt2/promptkd/promptkd_medium.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=8
train promptkd \
    --model-path "${base}checkpoints/gpt2/train/minillm_init/gpt2-medium/" \
    --teacher-model-path "${base}checkpoints/gpt2/train/sft/gpt2-xlarge/" \
    --data-dir "${base}processed_data/dolly/full/gpt2/" \
    --save "${base}results/gpt2/train/promptkd/gpt2-medium-xlarge" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 2 --gradient-accumulation-steps 4 --eval-batch-size 8 \
    --lr 0.00001 --teacher-lr 0.00001 --epochs 20 \
    "$@"
