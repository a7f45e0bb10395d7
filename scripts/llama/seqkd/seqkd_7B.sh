#!/usr/bin/env bash
# SeqKD: Llama 7B learns what Llama 13B answered, mixed with KD; --kd-ratio 0 is SeqKD proper.
#   bash scripts/llama/seqkd/seqkd_7B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train seqkd \
    --model-path huggyllama/llama-7b \
    --teacher-model-path "${base}checkpoints/llama/train/sft/llama-13B/" \
    --data-dir "${base}processed_data/dolly/pseudo/llama-13B-sft/" \
    --save "${base}results/llama/train/seqkd/llama-7B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.00001 --epochs 10 \
    "$@"
