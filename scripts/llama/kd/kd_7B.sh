#!/usr/bin/env bash
# KD: Llama 7B learns from Llama 13B on the texts of the data.
#   bash scripts/llama/kd/kd_7B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train kd \
    --model-path huggyllama/llama-7b \
    --teacher-model-path "${base}checkpoints/llama/train/sft/llama-13B/" \
    --data-dir "${base}processed_data/dolly/full/llama/" \
    --save "${base}results/llama/train/kd/llama-7B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.00001 --epochs 10 \
    "$@"
