#!/usr/bin/env bash
# DistiLLM-2: GPT-2 medium (355M) learns from GPT-2 XL on pairs of responses, from tools/generate_data_distillm2.sh.
#   bash scripts/gpt2/distillm2/distillm2_medium.sh [base_path] [port] [gpus] [options...]
# Settings: not certain, no GPT-2 recipe of DistiLLM-2 (Ko et al., ICML 2025) is known. These are DistiLLM's
# (jongwooko/distillm at 17c0f98) with an effective batch of 32 pairs. Its Qwen2 recipe is LoRA with lr 5e-5.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train distillm2 \
    --model-path "${base}checkpoints/gpt2/train/minillm_init/gpt2-medium/" \
    --teacher-model-path "${base}checkpoints/gpt2/train/sft/gpt2-xlarge/" \
    --data-dir "${base}processed_data/dolly/distillm2/gpt2-xlarge/" \
    --student-data-dir "${base}processed_data/dolly/distillm2/gpt2-medium/" \
    --save "${base}results/gpt2/train/distillm2/gpt2-medium-xlarge" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.0005 --epochs 20 \
    --skew 0.1 \
    "$@"
