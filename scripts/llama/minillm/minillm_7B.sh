#!/usr/bin/env bash
# MiniLLM: Llama 7B learns from Llama 13B on its own answers, by policy gradient.
#   bash scripts/llama/minillm/minillm_7B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train minillm \
    --model-path "${base}checkpoints/llama/train/minillm_init/llama-7B" \
    --teacher-model-path "${base}checkpoints/llama/train/sft/llama-13B/" \
    --prompt-data-dir "${base}processed_data/dolly/prompt/llama/" \
    --lm-data-dir "${base}processed_data/roberta/llama/512/20M/" \
    --save "${base}results/llama/train/minillm/llama-7B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 16 --gradient-accumulation-steps 1 --chunk-size 16 \
    --scheduler-name cosine_trm \
    "$@"
