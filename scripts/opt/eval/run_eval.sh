#!/usr/bin/env bash
# A checkpoint on all five test sets with five seeds, in one process and one load of the model: prints a table and
# writes it to results/opt/eval_main/<checkpoint>/ as results.md and results.json, with the answers.
#   bash scripts/opt/eval/run_eval.sh [base_path] CHECKPOINT [options...]
# CHECKPOINT: a folder below base_path, such as checkpoints/opt/train/promptkd/opt-1.3B
# All visible GPUs share the work, a process on each; CUDA_VISIBLE_DEVICES=0 makes it one.
case ${2:--} in -*) set -- "" "$@" ;; esac # a single argument is the checkpoint
set -- "$1" "" "" "${@:2}"
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

[ -n "$checkpoint" ] || stop "name a checkpoint: bash scripts/opt/eval/run_eval.sh . CHECKPOINT"
launch evaluate.py --model-path "$(below_base "$checkpoint")" \
    --save "${base}results/opt/eval_main/$(flat_name "$checkpoint")" \
    --data-dir "${base}data" --data-names dolly self_inst vicuna sinst uinst --seeds 10 20 30 40 50 \
    "${lengths[@]}" "${decoding[@]}" "$@"
