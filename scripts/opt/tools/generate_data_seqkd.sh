#!/usr/bin/env bash
# SeqKD, first step: OPT 13B answers the training prompts. Then tools/process_data_pseudo.sh, then seqkd/*.sh.
#   bash scripts/opt/tools/generate_data_seqkd.sh [base_path] [port] [gpus] [checkpoint] [options...]
# checkpoint: the fine-tuned teacher's folder below base_path, such as checkpoints/opt/train/sft/opt-13B
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

generate results/opt/train/sft/opt-13B/ \
    --data-dir "${base}processed_data/dolly/full/opt/" --data-names dolly \
    --save "${base}results/opt/gen/" \
    --deepspeed_config "${configs}ds_config.json" --model-parallel --model-parallel-size 4 \
    "$@"
