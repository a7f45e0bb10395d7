"""Quantization of a frozen teacher to 8 or 4 bits per weight with the optional library bitsandbytes.

8bit is LLM.int8 (Dettmers et al., 2022) and 4bit is NF4 (QLoRA, Dettmers et al., 2023). Both pass on the gradient with
respect to the inputs, which the soft prompt needs. Embeddings, norms and head keep the teacher's precision, because
the losses read the head. Both run on GPUs and CPUs.
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
    """Check --teacher-quantization against the other settings before anything is loaded.

    Args:
        settings: The run's settings.
        stage: The ZeRO stage of the teacher's engine.

    Raises:
        UserError: If the teacher cannot be quantized in this run.
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
        raise UserError(f"{given} does not go with a teacher cut by --model-parallel-size: omit one of them")
    if stage == 3:
        raise UserError(
            f"{given} does not go with ZeRO-3, which cannot partition such weights: give a "
            "--teacher-deepspeed-config of stage 0, 1 or 2"
        )


def loading_options(kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize weights while they are read onto `device`."""
    if kind == NONE:
        return {}
    bits: dict[str, Any] = {"load_in_8bit": True}
    if kind == "4bit":
        bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(**bits), "device_map": {"": device}}
