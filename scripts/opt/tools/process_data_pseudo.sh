#!/usr/bin/env bash
# SeqKD, second step: the teacher's answers, from generate_data_seqkd.sh, become the training data of seqkd/*.sh.
#   bash scripts/opt/tools/process_data_pseudo.sh [base_path] [options...]
# The valid split is Dolly's own: run process_data_dolly.sh first, or download processed_data/dolly.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

process pseudo \
    --generated "${base}results/opt/gen/generated.jsonl" --data-dir "${base}processed_data/dolly/full/opt/" \
    --tokenizer facebook/opt-1.3b --save "${base}processed_data/dolly/pseudo/opt-13B-sft/" --max-prompt-length 256 \
    "$@"
