#!/usr/bin/env bash
# DistiLLM-2, first step: the teacher, then the student, answers the training prompts, for the pairs of distillm2/*.sh.
#   bash scripts/gpt2/tools/generate_data_distillm2.sh [base_path] [port] [gpus] [checkpoint] [options...]
# checkpoint: the student's folder below base_path; default: checkpoints/gpt2/train/minillm_init/gpt2-base
# options: of tools/generate.py. The sets are processed_data/dolly/distillm2/<name of the model's folder>/.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

student=${checkpoint:-checkpoints/gpt2/train/minillm_init/gpt2-base} data=${base}processed_data/dolly/full/gpt2/
checkpoint='' positional=()
for model in checkpoints/gpt2/train/sft/gpt2-xlarge "${student%/}"; do
    answers=${base}results/gpt2/gen/distillm2/${model##*/}
    (generate "$model" --data-dir "$data" --data-names dolly --save "$answers" \
        --deepspeed_config "${configs}ds_config.json" "$@") # in a subshell, which it replaces
    if prints_only; then exit; fi
    process pseudo --generated "$answers/generated.jsonl" --data-dir "$data" --tokenizer "$(below_base "$model")" \
        --save "${base}processed_data/dolly/distillm2/${model##*/}/" --overwrite \
        --max-prompt-length "$(value_of --max-prompt-length "${lengths[@]}" "$@")"
done
