#!/usr/bin/env bash
# GKD: OPT 1.3B learns from OPT 13B on its own responses and those of the data, half and half.
#   bash scripts/opt/gkd/gkd_1.3B.sh [base_path] [port] [gpus] [options...]
# Settings: jongwooko/distillm at 17c0f98, scripts/opt/gkd/gkd_1.3B_2.7B.sh, where the teacher is OPT 2.7B. Not
# certain: the effective batch of 32.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train gkd \
    --model-path "${base}checkpoints/opt/train/minillm_init/opt-1.3B/" \
    --teacher-model-path "${base}checkpoints/opt/train/sft/opt-13B/" \
    --data-dir "${base}processed_data/dolly/full/opt/" \
    --save "${base}results/opt/train/gkd/opt-1.3B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.00005 --epochs 10 \
    --divergence jsd --jsd-beta 0.5 --student-data-fraction 0.5 \
    "$@"
