#!/usr/bin/env bash
# An ablation of PromptKD: the recipe of promptkd_base.sh with one change.
#   bash scripts/gpt2/ablations/ablation.sh NAME [base_path] [port] [gpus] [options...]
# NAME: length_1, _3, _7, _20, _50; init_random, init_pad, init_text; teacher_forward, base_forward, student_forward,
# all_forward, all_reverse (directions of the KLs); no_base; frozen_prompt; no_prompt. The paper's are init_text,
# length_7 and all_reverse. The student goes to results/gpt2/train/ablations/NAME.
ablation=${1:-} && set -- "${@:2}"
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

case $ablation in
length_1 | length_3 | length_7 | length_20 | length_50) change=(--prompt-len "${ablation#length_}") ;;
init_random | init_pad) change=(--prompt-init-text "$([ "$ablation" = init_pad ] && echo PAD || echo random)") ;;
init_text) change=(--prompt-init-text "Suppose you are a student.") ;;
teacher_forward | base_forward | student_forward) change=("--${ablation%_*}-kld-type" forward) ;;
all_forward | all_reverse) change=(--{teacher,base,student}-kld-type="${ablation#all_}") ;;
no_base) change=(--base-coef 0) ;;
frozen_prompt) change=(--teacher-lr 0) ;;
no_prompt) change=(--prompt-len 0) ;;
*) stop "ablation '$ablation': choose one of the names in the first lines of $0" ;;
esac
set -- "$base_path" "$port" ${gpus:+"$gpus"} --save "${base}results/gpt2/train/ablations/$ablation" "${change[@]}" "$@"
source "$root/scripts/gpt2/promptkd/promptkd_base.sh"
