#!/usr/bin/env bash
# The start of PromptKD and MiniLLM for Llama 7B: SFT, the checkpoint of lowest dev loss is taken:
#   cp -r results/llama/train/minillm_init/llama-7B/best_loss checkpoints/llama/train/minillm_init/llama-7B
#
#   bash scripts/llama/minillm_init/minillm_init_7B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train sft \
    --model-path huggyllama/llama-7b \
    --data-dir "${base}processed_data/dolly/full/llama/" \
    --save "${base}results/llama/train/minillm_init/llama-7B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 4 --gradient-accumulation-steps 2 --eval-batch-size 8 \
    --lr 0.00001 --epochs 10 --seed-order 10 \
    --no-eval-gen \
    "$@"
