#!/usr/bin/env bash
# SeqKD, second step: the teacher's answers, from generate_data_seqkd.sh, become the training data of seqkd/*.sh.
#   bash scripts/gpt2/tools/process_data_pseudo.sh [base_path] [options...]
# The valid split is Dolly's own: run process_data_dolly.sh first, or download processed_data/dolly.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

process pseudo \
    --generated "${base}results/gpt2/gen/generated.jsonl" --data-dir "${base}processed_data/dolly/full/gpt2/" \
    --tokenizer gpt2 --save "${base}processed_data/dolly/pseudo/gpt2-xlarge-sft/" --max-prompt-length 256 \
    "$@"
