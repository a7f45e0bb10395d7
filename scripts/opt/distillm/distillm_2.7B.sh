#!/usr/bin/env bash
# DistiLLM: OPT 2.7B learns from OPT 13B by a skewed KL, on responses that become its own.
#   bash scripts/opt/distillm/distillm_2.7B.sh [base_path] [port] [gpus] [options...]
# Settings: not certain, the authors publish none of this size. Those of OPT 1.3B (jongwooko/distillm at 17c0f98),
# with the lr of kd_2.7B.sh. The corpus is that of minillm/*.sh; --lm-data-dir= omits it.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train distillm \
    --model-path "${base}checkpoints/opt/train/minillm_init/opt-2.7B/" \
    --teacher-model-path "${base}checkpoints/opt/train/sft/opt-13B/" \
    --data-dir "${base}processed_data/dolly/full/opt/" \
    --lm-data-dir "${base}processed_data/roberta/opt/512/20M/" \
    --save "${base}results/opt/train/distillm/opt-2.7B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.00005 --epochs 10 \
    --divergence skew_reverse_kl --skew 0.1 --init-threshold 0.0 --loss-eps 0.1 --capacity 1000 \
    "$@"
