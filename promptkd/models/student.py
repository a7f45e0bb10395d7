"""Load the student, with LoRA adapters if the run trains only those."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from promptkd.config.lora_options import LoraSettings
from promptkd.config.options import ModelSettings
from promptkd.models.adapters import add_lora, base_of
from promptkd.models.loading import load_causal_lm
from promptkd.models.quantization import loading_options
from promptkd.models.tensor_parallel import TensorParallelGroup

OPTION = "--model-path"


def load_student(
    models: ModelSettings,
    lora: LoraSettings,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    group: TensorParallelGroup | None,
) -> PreTrainedModel:
    """Load the student in eval mode.

    Args:
        models: The models' options.
        lora: The options of adapters.
        dtype: The engine's precision. Trained weights are float32, for the engine's master weights.
        device: The rank's device, which quantized weights are read to.
        seed: The seed of new adapters.
        group: The ranks that hold the student together.

    Raises:
        UserError: If the student is missing or damaged, or the options do not fit it.
    """
    if not lora.lora_r:
        student = load_causal_lm(models.model_path, torch.float32, OPTION, models.model_type, group)
    else:
        base = base_of(models.model_path, OPTION)
        quantization = loading_options(lora.student_quantization, dtype, device)
        student = load_causal_lm(base, dtype, OPTION, models.model_type, quantization=quantization)
        add_lora(student, lora, models.model_path, seed)
    if models.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student
