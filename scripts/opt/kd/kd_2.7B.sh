#!/usr/bin/env bash
# KD: OPT 2.7B learns from OPT 13B on the texts of the data.
#   bash scripts/opt/kd/kd_2.7B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train kd \
    --model-path facebook/opt-2.7b \
    --teacher-model-path "${base}checkpoints/opt/train/sft/opt-13B/" \
    --data-dir "${base}processed_data/dolly/full/opt/" \
    --save "${base}results/opt/train/kd/opt-2.7B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.00005 --epochs 10 \
    "$@"
