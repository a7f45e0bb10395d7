#!/usr/bin/env bash
# DistiLLM: GPT-2 base (124M) learns from GPT-2 XL by a skewed KL, on responses that become its own.
#   bash scripts/gpt2/distillm/distillm_base.sh [base_path] [port] [gpus] [options...]
# Settings: jongwooko/distillm at 17c0f98, scripts/gpt2/distillm/train_0.1B_1.5B.sh (adaptive-sfkl). Not certain: the
# effective batch of 32, which is batch 8 x the 4 GPUs of its README. The script starts 16 GPUs. --lm-data-dir= omits
# the corpus.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train distillm \
    --model-path "${base}checkpoints/gpt2/train/minillm_init/gpt2-base/" \
    --teacher-model-path "${base}checkpoints/gpt2/train/sft/gpt2-xlarge/" \
    --data-dir "${base}processed_data/dolly/full/gpt2/" \
    --lm-data-dir "${base}processed_data/openwebtext/gpt2/512/10M/" \
    --save "${base}results/gpt2/train/distillm/gpt2-base-xlarge" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 8 --gradient-accumulation-steps 1 --eval-batch-size 8 \
    --lr 0.0005 --epochs 20 \
    --divergence skew_forward_kl --skew 0.1 --init-threshold 0.0 --loss-eps 0.1 --capacity 1000 \
    "$@"
