#!/usr/bin/env bash
# On-policy reverse KL: GPT-2 medium (355M) learns from GPT-2 XL on its own responses, as PromptKD without its prompt.
#   bash scripts/gpt2/gkd/on_policy_medium.sh [base_path] [port] [gpus] [options...]
# Settings: lr and epochs as in later experiments of PromptKD's authors (gmkim-ai/MoEKD). Not certain: that repository
# has other students, and some of its scripts have lr 1e-5. Start, batch and the rest are those of gkd_*.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train gkd \
    --model-path "${base}checkpoints/gpt2/train/minillm_init/gpt2-medium/" \
    --teacher-model-path "${base}checkpoints/gpt2/train/sft/gpt2-xlarge/" \
    --data-dir "${base}processed_data/dolly/full/gpt2/" \
    --save "${base}results/gpt2/train/on_policy/gpt2-medium-xlarge" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.000005 --epochs 10 \
    --divergence reverse_kl --student-data-fraction 1 \
    "$@"
