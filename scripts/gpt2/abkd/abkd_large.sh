#!/usr/bin/env bash
# ABKD: GPT-2 large (774M) learns from GPT-2 XL by the alpha-beta divergence on the data. A recipe of GKD.
#   bash scripts/gpt2/abkd/abkd_large.sh [base_path] [port] [gpus] [options...]
# Settings: alpha 0.2 and beta 0.7 of ABKD's paper (Wang et al., ICML 2025); it is KD with that divergence; the rest
# is DistiLLM's, on which its code (ghwang-s/abkd at df81318) is built. Not certain: this size, which its code does
# not have, and the effective batch of 32.
source "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh"

published_gpus=4
train gkd \
    --model-path "${base}checkpoints/gpt2/train/minillm_init/gpt2-large/" \
    --teacher-model-path "${base}checkpoints/gpt2/train/sft/gpt2-xlarge/" \
    --data-dir "${base}processed_data/dolly/full/gpt2/" \
    --save "${base}results/gpt2/train/abkd/gpt2-large-xlarge" \
    --deepspeed_config "${configs}ds_config.json" \
    --batch-size 4 --gradient-accumulation-steps 2 --eval-batch-size 8 \
    --lr 0.0001 --epochs 10 \
    --divergence alpha_beta --ab-alpha 0.2 --ab-beta 0.7 --student-data-fraction 0 \
    "$@"
