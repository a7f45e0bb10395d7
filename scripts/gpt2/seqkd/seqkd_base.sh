#!/usr/bin/env bash
# SeqKD: GPT-2 base (124M) learns what GPT-2 XL answered, mixed with KD; --kd-ratio 0 is SeqKD proper.
#   bash scripts/gpt2/seqkd/seqkd_base.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=8
train seqkd \
    --model-path gpt2 \
    --teacher-model-path "${base}checkpoints/gpt2/train/sft/gpt2-xlarge/" \
    --data-dir "${base}processed_data/dolly/pseudo/gpt2-xlarge-sft/" \
    --save "${base}results/gpt2/train/seqkd/gpt2-base-xlarge" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 2 --gradient-accumulation-steps 2 --eval-batch-size 8 \
    --lr 0.0005 --epochs 20 \
    "$@"
