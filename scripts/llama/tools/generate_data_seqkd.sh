#!/usr/bin/env bash
# SeqKD, first step: Llama 13B answers the training prompts. Then tools/process_data_pseudo.sh, then seqkd/*.sh.
#   bash scripts/llama/tools/generate_data_seqkd.sh [base_path] [port] [gpus] [checkpoint] [options...]
# checkpoint: the fine-tuned teacher's folder below base_path, such as checkpoints/llama/train/sft/llama-13B
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

generate results/llama/train/sft/llama-13B/ \
    --data-dir "${base}processed_data/dolly/full/llama/" --data-names dolly \
    --save "${base}results/llama/gen/" \
    --deepspeed_config "${configs}ds_config.json" --model-parallel --model-parallel-size 4 \
    "$@"
