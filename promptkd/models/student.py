"""Load the student, with LoRA adapters if the run trains only those."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from promptkd.config.deepspeed import DTYPES, precision
from promptkd.config.resolve import RunConfig
from promptkd.models.adapters import add_lora, base_of
from promptkd.models.loading import load_causal_lm
from promptkd.models.quantization import loading_options
from promptkd.models.tensor_parallel import TensorParallelGroup


def load_student(config: RunConfig, device: torch.device, group: TensorParallelGroup | None) -> PreTrainedModel:
    """Load the student of a run in eval mode.

    Trained weights are float32, for the engine's master weights. Frozen ones have the engine's precision.

    Args:
        config: The run.
        device: The rank's device, which quantized weights are read to.
        group: The ranks that hold the student together.
    """
    path, kind, lora = config.models.model_path, config.models.model_type, config.lora
    dtype = DTYPES[precision(config.deepspeed)] if lora.lora_r else torch.float32
    quantization = loading_options(lora.student_quantization, dtype, device)
    base = base_of(path, "--model-path") if lora.lora_r else path  # an adapter is merged unless it is trained further
    student = load_causal_lm(base, dtype, "--model-path", kind, group, quantization)
    if lora.lora_r:
        add_lora(student, lora, path, config.run.seed)
    if config.models.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student.eval()  # new adapters are in training mode
