#!/usr/bin/env bash
# SeqKD: OPT 1.3B learns what OPT 13B answered, mixed with KD; --kd-ratio 0 is SeqKD proper.
#   bash scripts/opt/seqkd/seqkd_1.3B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train seqkd \
    --model-path facebook/opt-1.3b \
    --teacher-model-path "${base}checkpoints/opt/train/sft/opt-13B/" \
    --data-dir "${base}processed_data/dolly/pseudo/opt-13B-sft/" \
    --save "${base}results/opt/train/seqkd/opt-1.3B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.00005 --epochs 10 \
    "$@"
