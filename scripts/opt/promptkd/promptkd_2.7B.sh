#!/usr/bin/env bash
# PromptKD: OPT 2.7B learns from OPT 13B, whose prompt is tuned to the student.
#   bash scripts/opt/promptkd/promptkd_2.7B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train promptkd \
    --model-path "${base}checkpoints/opt/train/minillm_init/opt-2.7B" \
    --teacher-model-path "${base}checkpoints/opt/train/sft/opt-13B/" \
    --data-dir "${base}processed_data/dolly/full/opt/" \
    --save "${base}results/opt/train/promptkd/opt-2.7B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 16 --gradient-accumulation-steps 1 --eval-batch-size 16 \
    --lr 0.000005 --teacher-lr 0.000005 --epochs 10 \
    "$@"
