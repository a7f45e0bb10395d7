#!/usr/bin/env bash
# GKD: GPT-2 large (774M) learns from GPT-2 XL on its own responses and those of the data, half and half.
#   bash scripts/gpt2/gkd/gkd_large.sh [base_path] [port] [gpus] [options...]
# Settings: jongwooko/distillm at 17c0f98, scripts/gpt2/gkd/gkd_large.sh (mixed-jsd, mixed-alpha 0.5). That script has
# lr 5e-4 and batch 8; 1e-4 is that of DistiLLM for this size. Not certain: the effective batch of 32, which is batch
# 4 x accumulation 2 x the 4 GPUs of its README. The script starts 16 GPUs without accumulation.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train gkd \
    --model-path "${base}checkpoints/gpt2/train/minillm_init/gpt2-large/" \
    --teacher-model-path "${base}checkpoints/gpt2/train/sft/gpt2-xlarge/" \
    --data-dir "${base}processed_data/dolly/full/gpt2/" \
    --save "${base}results/gpt2/train/gkd/gpt2-large-xlarge" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 4 --gradient-accumulation-steps 2 --eval-batch-size 8 \
    --lr 0.0001 --epochs 10 \
    --divergence jsd --jsd-beta 0.5 --student-data-fraction 0.5 \
    "$@"
