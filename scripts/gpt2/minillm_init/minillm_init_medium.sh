#!/usr/bin/env bash
# The start of PromptKD and MiniLLM for GPT-2 medium (355M): SFT, the checkpoint of lowest dev loss is taken:
#   cp -r results/gpt2/train/minillm_init/gpt2-medium/best_loss checkpoints/gpt2/train/minillm_init/gpt2-medium
#
#   bash scripts/gpt2/minillm_init/minillm_init_medium.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=8
train sft \
    --model-path gpt2-medium \
    --data-dir "${base}processed_data/dolly/full/gpt2/" \
    --save "${base}results/gpt2/train/minillm_init/gpt2-medium" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 2 --gradient-accumulation-steps 2 --eval-batch-size 8 \
    --lr 0.0001 --epochs 20 \
    --no-eval-gen \
    "$@"
