"""A frozen teacher in 8 or 4 bits a weight, by bitsandbytes: for one that fits its GPU in no other way.

8bit is LLM.int8 (Dettmers et al., 2022), 4bit is NF4 (QLoRA, Dettmers et al., 2023), both with the gradient to the
inputs that the soft prompt needs. Embeddings, norms and head keep the teacher's precision: the losses read the head.
It runs on GPUs and on CPUs; bitsandbytes is an optional library.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from promptkd.errors import UserError

NONE = "none"


def check_quantization(settings: SimpleNamespace, stage: int) -> None:
    """Raise UserError where the teacher cannot be held as --teacher-quantization says, before anything is loaded.

    stage: of ZeRO in the teacher's engine.
    """
    kind = settings.models.teacher_quantization
    if kind == NONE:
        return
    given = f"--teacher-quantization {kind}"
    if not settings.models.teacher_model_path:
        raise UserError(f"{given} needs --teacher-model-path: name the teacher's folder")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{given} needs bitsandbytes, which is not installed: .venv/bin/pip install bitsandbytes")
    if settings.parallel.teacher_size > 1:
        raise UserError(f"{given} does not go with a teacher cut by --model-parallel-size: leave one of them out")
    if stage == 3:
        raise UserError(
            f"{given} does not go with ZeRO-3, which cannot share such weights out: name a "
            "--teacher-deepspeed-config of stage 0, 1 or 2"
        )


def loading_options(kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` has to be told: weights are packed as they are read, straight on `device`."""
    if kind == NONE:
        return {}
    bits = {"load_in_8bit": True}
    if kind == "4bit":
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(**bits), "device_map": {"": device}}
