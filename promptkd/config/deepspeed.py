"""DeepSpeed config files: which keys they may have, and which precision and ZeRO stage they ask for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from promptkd.errors import UserError
from promptkd.utils import project
from promptkd.utils.strict_json import read_object

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIGS = project.CONFIGS / "deepspeed"
# Values that come from command-line options. A DeepSpeed file may say "auto" or leave them out.
OWNED = {
    "train_batch_size": "--batch-size and --gradient-accumulation-steps",
    "train_micro_batch_size_per_gpu": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation-steps",
    "gradient_clipping": "--clip-grad",
    "optimizer": "--lr and --weight-decay",
    "scheduler": "--lr-decay-style and --warmup-iters",
}
# Features that write files of their own, need other packages, or change the training without a trace.
UNSUPPORTED = (
    "amp", "autotuning", "comet", "compression_training", "csv_monitor", "curriculum_learning", "data_efficiency",
    "eigenvalue", "elasticity", "flops_profiler", "nebula", "progressive_layer_drop", "quantize_training",
    "sparse_attention", "tensorboard", "wandb",
)  # fmt: skip


def read_deepspeed_config(path: str | None, device: torch.device, option: str = "--deepspeed_config") -> dict[str, Any]:
    """Read and check a DeepSpeed file.

    Half precision without ZeRO is refused: DeepSpeed's bf16 optimizer loses small updates there, and its fp16 optimizer
    divides by a loss scale that the loss was never multiplied by.

    Args:
        path: The file. The default is bf16 on a GPU that has it, fp16 on another GPU, and fp32 on a CPU.
        device: The device of the run.
        option: The option that named the file, for error messages.

    Raises:
        UserError: The file is missing or not JSON, sets what an option decides, or asks for what cannot be used here.
    """
    if path is None:
        gpu_file = (
            "ds_config_bf16.json" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "ds_config.json"
        )
        path = str(CONFIGS / (gpu_file if device.type == "cuda" else "ds_config_fp32.json"))
    config = read_object(Path(path), f"name one of {CONFIGS}/*.json as {option}")
    for key, options in OWNED.items():
        if config.pop(key, "auto") != "auto":
            raise UserError(f'{option} {path} sets {key}: write "auto" and use {options}')
    for key in UNSUPPORTED:
        section = config.get(key, {"enabled": False})
        if not isinstance(section, dict) or section.get("enabled") is not False:
            raise UserError(f"{option} {path} has {key}, which is not supported: remove it")
    for key in ("fp16", "bf16", "zero_optimization"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"{option} {path}: {key} has to be an object, not {config[key]!r}")
        if not isinstance(enabled := config.get(key, {}).get("enabled", False), bool):
            raise UserError(f"{option} {path}: {key}.enabled has to be true or false, not {enabled!r}")
    hysteresis = config.get("fp16", {}).get("hysteresis", 2)
    if not isinstance(hysteresis, int) or isinstance(hysteresis, bool) or hysteresis < 1:
        raise UserError(f"{option} {path}: fp16.hysteresis has to be a number of overflows from 1, not {hysteresis!r}")
    types = config.get("data_types", {})
    if not isinstance(types, dict) or types.get("grad_accum_dtype") not in (None, "fp32", "bf16", "fp16"):
        raise UserError(f"{option} {path}: data_types.grad_accum_dtype has to be fp32, bf16 or fp16")
    if not isinstance(stage := zero_stage(config), int) or isinstance(stage, bool):
        raise UserError(f"{option} {path}: zero_optimization.stage has to be 0, 1, 2 or 3, not {stage!r}")
    if precision(config) == "fp16" and device.type == "cpu":
        raise UserError(f"{option} {path} asks for fp16, which a CPU does not have: use ds_config_fp32.json")
    if (kind := precision(config)) != "fp32" and not zero_stage(config):
        raise UserError(f"{option} {path} asks for {kind} without ZeRO: set zero_optimization.stage to 1 or more")
    return config


def check_with_deepspeed(
    config: dict[str, Any], path: str | None, device: torch.device, option: str = "--deepspeed_config"
) -> None:
    """Raise UserError if DeepSpeed itself refuses the content of the file that `option` named."""
    prepare_deepspeed(device)
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig({**config, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    except (DeepSpeedConfigError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(" [type=")[0]
        raise UserError(f"{option} {path}: DeepSpeed refuses it: {reason}") from None


def precision(config: dict[str, Any]) -> str:
    """Return fp16, bf16 or fp32."""
    for kind in ("fp16", "bf16"):
        if config.get(kind, {}).get("enabled"):
            return kind
    return "fp32"


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage, 0 for none."""
    stage: int = config.get("zero_optimization", {}).get("stage", 0)
    return stage


def with_bucket_for(zero: dict[str, Any], trained: int) -> dict[str, Any]:
    """Limit the gradient bucket of zero_optimization to the number of trained elements.

    DeepSpeed allocates the complete bucket, 2 GB in float32 by default, even for a soft prompt of some thousand
    elements.
    """
    return {**zero, "reduce_bucket_size": min(int(zero.get("reduce_bucket_size", 5e8)), trained)}


def with_precision(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the configuration in another precision."""
    if kind == precision(config):
        return config
    changed = {key: value for key, value in config.items() if key not in ("fp16", "bf16")}
    if kind != "fp32":
        changed[kind] = {"enabled": True}
        if not zero_stage(changed):
            changed["zero_optimization"] = {"stage": 1}
    return changed


def prepare_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, keep it from compiling on a CPU and from logging, and connect it to the ranks."""
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # it would compile a shared-memory collective
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
    return deepspeed
