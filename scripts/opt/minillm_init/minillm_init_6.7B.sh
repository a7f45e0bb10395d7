#!/usr/bin/env bash
# The start of PromptKD and MiniLLM for OPT 6.7B: SFT, the checkpoint of lowest dev loss is taken:
#   cp -r results/opt/train/minillm_init/opt-6.7B/best_loss checkpoints/opt/train/minillm_init/opt-6.7B
#
#   bash scripts/opt/minillm_init/minillm_init_6.7B.sh [base_path] [port] [gpus] [options...]
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train sft \
    --model-path facebook/opt-6.7b \
    --data-dir "${base}processed_data/dolly/full/opt/" \
    --save "${base}results/opt/train/minillm_init/opt-6.7B" \
    --deepspeed_config "${configs}ds_config_zero2_offload.json" --gradient-checkpointing \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.00001 --epochs 10 --seed-order 10 \
    --no-eval-gen \
    "$@"
