#!/usr/bin/env bash
# SFT of GPT-2 XL (1.5B), the teacher of the others.
#   bash scripts/gpt2/sft/sft_xlarge.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=8
train sft \
    --model-path "${base}checkpoints/gpt2/gpt2-xlarge/" \
    --data-dir "${base}processed_data/dolly/full/gpt2/" \
    --save "${base}results/gpt2/train/sft/gpt2-xlarge" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 2 --gradient-accumulation-steps 2 --eval-batch-size 8 \
    --lr 0.00005 --epochs 10 --seed-order 10 \
    "$@"
