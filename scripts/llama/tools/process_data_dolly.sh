#!/usr/bin/env bash
# Dolly as token files of llama: prompts with responses (full), and prompts alone for MiniLLM (prompt).
#   bash scripts/llama/tools/process_data_dolly.sh [base_path] [options...]
# Reads data/dolly/raw.jsonl: bash download_requirements.sh --only data/dolly gets it.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

dolly=(--raw "${base}data/dolly/raw.jsonl" --tokenizer huggyllama/llama-7b)
dolly+=(--max-prompt-length 256 --dev-num 1000)
process instructions "${dolly[@]}" --save "${base}processed_data/dolly/full/llama/" "$@"
process instructions "${dolly[@]}" --save "${base}processed_data/dolly/prompt/llama/" --only-prompt "$@"
