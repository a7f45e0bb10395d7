#!/usr/bin/env bash
# Vicuna: answers with one seed (--seeds 10 20 30: several), scored by ROUGE-L.
#   bash scripts/llama/eval/eval_main_vicuna.sh [base_path] [port] [gpus] [checkpoint] [options...]
# checkpoint: folder below base_path; the published name is a placeholder. On a CPU: --dtype fp32
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

evaluate llama vicuna llama-7B \
    --data-dir "${base}data/vicuna" --data-names vicuna \
    --deepspeed_config "${configs}ds_config.json" \
    "$@"
