#!/usr/bin/env bash
# SFT of Llama 7B.
#   bash scripts/llama/sft/sft_7B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train sft \
    --model-path huggyllama/llama-7b \
    --data-dir "${base}processed_data/dolly/full/llama/" \
    --save "${base}results/llama/train/sft/llama-7B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 4 --gradient-accumulation-steps 2 --eval-batch-size 8 \
    --lr 0.00001 --epochs 10 --seed-order 10 \
    "$@"
