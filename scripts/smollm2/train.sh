#!/usr/bin/env bash
# The methods, from the same start and with as many updates each.
#   bash scripts/smollm2/train.sh [options of train.py]
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

for method in "${methods[@]}"; do
    own=(--data-dir "$out/data" --teacher-model-path "$teacher")
    case $method in
    sft) own=(--data-dir "$out/data") ;;
    seqkd) own=(--data-dir "$out/pseudo" --teacher-model-path "$teacher") ;;
    minillm)
        own=(--prompt-data-dir "$out/data" --teacher-model-path "$teacher"
            --chunk-size "$BATCH" --num-rollouts $((4 * BATCH)))
        ;;
    esac
    stage "$method" start "$python" train.py "${train_options[@]}" --method "$method" --save "$out/$method" \
        --model-path "$out/start/last" --lr "$LR" --total-iters "$STEPS" --eval-interval $(((STEPS + 2) / 3)) \
        "${own[@]}" "$@"
    rm -rf "$out/$method"/{checkpoints,best_*} # the last student is what is compared: all had as many updates
done
