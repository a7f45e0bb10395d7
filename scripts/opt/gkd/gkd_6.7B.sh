#!/usr/bin/env bash
# GKD: OPT 6.7B learns from OPT 13B on its own responses and those of the data, half and half.
#   bash scripts/opt/gkd/gkd_6.7B.sh [base_path] [port] [gpus] [options...]
# Settings: not certain, the authors publish none of this size. Those of OPT 1.3B (jongwooko/distillm at 17c0f98),
# with the lr of kd_6.7B.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train gkd \
    --model-path "${base}checkpoints/opt/train/minillm_init/opt-6.7B/" \
    --teacher-model-path "${base}checkpoints/opt/train/sft/opt-13B/" \
    --data-dir "${base}processed_data/dolly/full/opt/" \
    --save "${base}results/opt/train/gkd/opt-6.7B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.00001 --epochs 10 \
    --divergence jsd --jsd-beta 0.5 --student-data-fraction 0.5 \
    "$@"
