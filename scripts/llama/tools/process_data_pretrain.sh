#!/usr/bin/env bash
# MiniLLM's pre-training corpus, the RoBERTa corpus, packed into rows of 512 tokens of llama.
#   bash scripts/llama/tools/process_data_pretrain.sh [base_path] [options...]
# Reads data/roberta/data.txt: a document on each line, "<@x(x!>" for a newline within it.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

process corpus \
    --raw "${base}data/roberta/data.txt" --tokenizer huggyllama/llama-7b \
    --save "${base}processed_data/roberta/llama/512/20M/" \
    --max-length 512 --train-num 20000000 --dev-num 10000 \
    "$@"
