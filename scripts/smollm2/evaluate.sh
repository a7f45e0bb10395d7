#!/usr/bin/env bash
# Test sets, exposure bias and the report, with the start and the teacher to compare.
#   bash scripts/smollm2/evaluate.sh [options of evaluate.py for the test sets]
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if [ -n "$DATA_ROOT" ]; then
    tests=(--data-dir "$DATA_ROOT" --data-names "${sets[@]}" --dev-num "$TEST_ROWS")
else
    tests=(--data-dir "$out/$([ -n "$DATA" ] && echo data || echo exercises/test/test)" --data-names held_out)
fi
for name in teacher start "${methods[@]}"; do
    model=$out/$name/last
    [ "$name" != teacher ] || model=$teacher
    stage "eval-$name" "$name" "$python" evaluate.py --model-path "$model" --save "$out/$name/eval" --overwrite \
        --template chat "${sizes[@]}" --seeds "${seeds[@]}" "${tests[@]}" "$@"
    [ "$name" != teacher ] || continue
    stage "exposure-$name" "$name" "$python" evaluate.py --type exposure_bias --model-path "$model" --overwrite \
        --teacher-model-path "$teacher" --save "$out/$name/exposure_bias" --template chat "${sizes[@]}" \
        --data-dir "$out/data" --data-names dev --dev-num "$SHOWN_DEV_ROWS" --no-repeat-ngram-size 0
done
[[ " ${methods[*]} " == *" sft "* ]] && baseline=sft || baseline=${methods[0]}
"$python" tools/report.py "${methods[@]/#/$out/}" --references "$out/teacher" "$out/start" --baseline "$baseline" \
    --save "$out" --title "SmolLM2-135M teaches a student made of $KEEP_LAYERS of its layers"
