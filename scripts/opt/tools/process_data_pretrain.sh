#!/usr/bin/env bash
# MiniLLM's pre-training corpus, the RoBERTa corpus, packed into rows of 512 tokens of opt.
#   bash scripts/opt/tools/process_data_pretrain.sh [base_path] [options...]
# Reads data/roberta/data.txt: a document on each line, "<@x(x!>" for a newline within it.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

process corpus \
    --raw "${base}data/roberta/data.txt" --tokenizer facebook/opt-1.3b \
    --save "${base}processed_data/roberta/opt/512/20M/" \
    --max-length 512 --train-num 20000000 --dev-num 10000 \
    "$@"
