#!/usr/bin/env bash
# GKD: Llama 7B learns from Llama 13B on its own responses and those of the data, half and half.
#   bash scripts/llama/gkd/gkd_7B.sh [base_path] [port] [gpus] [options...]
# Settings: not certain, the authors publish OpenLLaMA 3B with LoRA only (jongwooko/distillm at 17c0f98). Those of OPT
# 1.3B, with the lr of kd_7B.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train gkd \
    --model-path "${base}checkpoints/llama/train/minillm_init/llama-7B/" \
    --teacher-model-path "${base}checkpoints/llama/train/sft/llama-13B/" \
    --data-dir "${base}processed_data/dolly/full/llama/" \
    --save "${base}results/llama/train/gkd/llama-7B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.00001 --epochs 10 \
    --divergence jsd --jsd-beta 0.5 --student-data-fraction 0.5 \
    "$@"
