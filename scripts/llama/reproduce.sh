#!/usr/bin/env bash
# The paper's table for Llama: downloads, trains every row, evaluates it and writes the reports.
#   bash scripts/llama/reproduce.sh [base_path] [options...]
# --methods, --sizes and --train-seeds choose rows; --plan prints memory and steps, --dry-run each command; --help has
# all options. It may be stopped at any time: the same command continues.
source "$(dirname "${BASH_SOURCE[0]}")/../reproduce.sh" llama "$@"
