#!/usr/bin/env bash
# Training data in the teacher's chat template, and beside it the same prompts with what the teacher answers.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if [ -z "$DATA" ]; then
    stage exercises "" "$python" -m tools.make_world --save "$out/exercises" --dev-num "$DEV_ROWS" \
        --train-num "$ANSWERS" --teacher-num "$ANSWERS" --test-num "$TEST_ROWS"
    cat "$out"/exercises/data/{valid,train}.jsonl >"$raw"
fi
processing=(tools/process_data.py instructions --template chat --max-prompt-length "$PROMPT_LENGTH")
stage data student "$python" "${processing[@]}" --raw "$raw" --tokenizer "$teacher" --dev-num "$DEV_ROWS" --save "$out/data"
stage answers data "$python" tools/generate.py --model-path "$teacher" --data-dir "$out/data" "${sizes[@]}" \
    --gen-num "$ANSWERS" --save "$out/answers"
stage pseudo answers "$python" tools/process_data.py pseudo --generated "$out/answers/generated.jsonl" \
    --data-dir "$out/data" --tokenizer "$teacher" --max-prompt-length "$PROMPT_LENGTH" --save "$out/pseudo"
