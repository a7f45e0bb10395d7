#!/usr/bin/env bash
# MiniLLM's pre-training corpus, OpenWebText, packed into rows of 512 tokens of gpt2.
#   bash scripts/gpt2/tools/process_data_pretrain.sh [base_path] [options...]
# Reads data/openwebtext/data.txt: a document on each line, "<@x(x!>" for a newline within it.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

process corpus \
    --raw "${base}data/openwebtext/data.txt" --tokenizer gpt2 \
    --save "${base}processed_data/openwebtext/gpt2/512/10M/" \
    --max-length 512 --train-num 10000000 --dev-num 10000 \
    "$@"
