#!/usr/bin/env bash
# MiniLLM: GPT-2 medium (355M) learns from GPT-2 XL on its own answers, by policy gradient.
#   bash scripts/gpt2/minillm/minillm_medium.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=8
train minillm \
    --model-path "${base}checkpoints/gpt2/train/minillm_init/gpt2-medium" \
    --teacher-model-path "${base}checkpoints/gpt2/train/sft/gpt2-xlarge/" \
    --prompt-data-dir "${base}processed_data/dolly/prompt/gpt2/" \
    --lm-data-dir "${base}processed_data/openwebtext/gpt2/512/10M/" \
    --save "${base}results/gpt2/train/minillm/gpt2-medium-xlarge" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 2 --gradient-accumulation-steps 4 --chunk-size 8 \
    "$@"
