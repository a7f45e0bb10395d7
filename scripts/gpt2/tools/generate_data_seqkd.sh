#!/usr/bin/env bash
# SeqKD, first step: GPT-2 XL answers the training prompts. Then tools/process_data_pseudo.sh, then seqkd/*.sh.
#   bash scripts/gpt2/tools/generate_data_seqkd.sh [base_path] [port] [gpus] [checkpoint] [options...]
# checkpoint: the fine-tuned teacher's folder below base_path, such as checkpoints/gpt2/train/sft/gpt2-xlarge
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

generate results/gpt2/train/sft/gpt2-xlarge/ \
    --data-dir "${base}processed_data/dolly/full/gpt2/" --data-names dolly \
    --save "${base}results/gpt2/gen/" \
    --deepspeed_config "${configs}ds_config.json" \
    "$@"
