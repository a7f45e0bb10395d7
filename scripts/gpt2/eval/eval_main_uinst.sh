#!/usr/bin/env bash
# Unnatural Instructions, the first 10,000 rows: answers with one seed (--seeds 10 20 30: several), scored by ROUGE-L.
#   bash scripts/gpt2/eval/eval_main_uinst.sh [base_path] [port] [gpus] [checkpoint] [options...]
# checkpoint: folder below base_path; the published name is a placeholder. On a CPU: --dtype fp32
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

evaluate gpt2 uinst gpt2-base \
    --data-dir "${base}data/uinst/11_" --data-names uinst_11_ --dev-num 10000 \
    --deepspeed_config "${configs}ds_config.json" \
    "$@"
