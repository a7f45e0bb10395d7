#!/usr/bin/env bash
# DistiLLM: Llama 7B learns from Llama 13B by a skewed KL, on responses that become its own.
#   bash scripts/llama/distillm/distillm_7B.sh [base_path] [port] [gpus] [options...]
# Settings: not certain, the authors publish OpenLLaMA 3B with LoRA only (jongwooko/distillm at 17c0f98). Those of OPT
# 1.3B, with the lr of kd_7B.sh. The corpus is that of minillm/*.sh; --lm-data-dir= omits it.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train distillm \
    --model-path "${base}checkpoints/llama/train/minillm_init/llama-7B/" \
    --teacher-model-path "${base}checkpoints/llama/train/sft/llama-13B/" \
    --data-dir "${base}processed_data/dolly/full/llama/" \
    --lm-data-dir "${base}processed_data/roberta/llama/512/20M/" \
    --save "${base}results/llama/train/distillm/llama-7B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.00001 --epochs 10 \
    --divergence skew_reverse_kl --skew 0.1 --init-threshold 0.0 --loss-eps 0.1 --capacity 1000 \
    "$@"
