#!/usr/bin/env bash
# SFT of Llama 13B, the teacher of the others.
#   bash scripts/llama/sft/sft_13B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train sft \
    --model-path huggyllama/llama-13b \
    --data-dir "${base}processed_data/dolly/full/llama/" \
    --save "${base}results/llama/train/sft/llama-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 2 --gradient-accumulation-steps 4 --eval-batch-size 2 \
    --lr 0.00001 --epochs 10 --seed-order 10 \
    "$@"
