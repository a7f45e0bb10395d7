#!/usr/bin/env bash
# PromptKD: Llama 7B learns from Llama 13B, whose prompt is tuned to the student.
#   bash scripts/llama/promptkd/promptkd_7B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train promptkd \
    --model-path "${base}checkpoints/llama/train/minillm_init/llama-7B/" \
    --teacher-model-path "${base}checkpoints/llama/train/sft/llama-13B/" \
    --data-dir "${base}processed_data/dolly/full/llama/" \
    --save "${base}results/llama/train/promptkd/llama-7B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 16 --gradient-accumulation-steps 1 --eval-batch-size 16 \
    --lr 0.000005 --teacher-lr 0.000005 --epochs 10 \
    "$@"
