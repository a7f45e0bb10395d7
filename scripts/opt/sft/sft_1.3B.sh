#!/usr/bin/env bash
# SFT of OPT 1.3B.
#   bash scripts/opt/sft/sft_1.3B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train sft \
    --model-path facebook/opt-1.3b \
    --data-dir "${base}processed_data/dolly/full/opt/" \
    --save "${base}results/opt/train/sft/opt-1.3B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.00005 --epochs 10 --seed-order 10 \
    "$@"
