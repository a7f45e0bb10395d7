#!/usr/bin/env bash
# MiniLLM: OPT 2.7B learns from OPT 13B on its own answers, by policy gradient.
#   bash scripts/opt/minillm/minillm_2.7B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train minillm \
    --model-path "${base}checkpoints/opt/train/minillm_init/opt-2.7B" \
    --teacher-model-path "${base}checkpoints/opt/train/sft/opt-13B/" \
    --prompt-data-dir "${base}processed_data/dolly/prompt/opt/" \
    --lm-data-dir "${base}processed_data/roberta/opt/512/20M/" \
    --save "${base}results/opt/train/minillm/opt-2.7B-13B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 16 --gradient-accumulation-steps 1 --chunk-size 16 \
    "$@"
