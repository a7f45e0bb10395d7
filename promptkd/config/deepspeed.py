"""DeepSpeed's own settings file: what may stand in it, and what it says of precision and ZeRO."""

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
# What the command line alone decides; a DeepSpeed file may say "auto" or nothing.
OWNED = {
    "train_batch_size": "--batch-size and --gradient-accumulation-steps",
    "train_micro_batch_size_per_gpu": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation-steps",
    "gradient_clipping": "--clip-grad",
    "optimizer": "--lr and --weight-decay",
    "scheduler": "--lr-decay-style and --warmup-iters",
}
# What would write files of its own where the file says, need other packages, or change the training unseen.
UNSUPPORTED = (
    "amp", "autotuning", "comet", "compression_training", "csv_monitor", "curriculum_learning", "data_efficiency",
    "eigenvalue", "elasticity", "flops_profiler", "nebula", "progressive_layer_drop", "quantize_training",
    "sparse_attention", "tensorboard", "wandb",
)  # fmt: skip


def read_deepspeed_config(path: str | None, device: torch.device, option: str = "--deepspeed_config") -> dict[str, Any]:
    """The DeepSpeed file that `option` names, checked.

    Without a path: bf16 on a GPU that has it, fp16 on another, fp32 on a CPU. Raises UserError when the file is
    missing, not JSON, sets what the command line owns, or asks for fp16 on a CPU, or for half precision without ZeRO.
    There DeepSpeed's bf16 optimizer loses small updates. Its fp16 optimizer divides by a loss scale that the loss was
    never multiplied with.
    """
    if path is None:
        gpu_file = (
            "ds_config_bf16.json" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "ds_config.json"
        )
        path = str(CONFIGS / (gpu_file if device.type == "cuda" else "ds_config_fp32.json"))
    config = read_object(Path(path), f"name one of {CONFIGS}/*.json as {option}")
    for key, options in OWNED.items():
        if config.pop(key, "auto") != "auto":
            raise UserError(f'{option} {path} sets {key}: say "auto" there and use {options}')
    for key in UNSUPPORTED:
        section = config.get(key, {"enabled": False})
        if not isinstance(section, dict) or section.get("enabled") is not False:
            raise UserError(f"{option} {path} has {key}, which is not supported here: take it out")
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
    """Raise UserError where DeepSpeed itself would refuse the file that `option` names, before anything is built."""
    prepare_deepspeed(device)
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig({**config, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    except (DeepSpeedConfigError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(" [type=")[0]
        raise UserError(f"{option} {path}: DeepSpeed refuses it: {reason}") from None


def precision(config: dict[str, Any]) -> str:
    """fp16, bf16 or fp32, as the DeepSpeed configuration says."""
    for kind in ("fp16", "bf16"):
        if config.get(kind, {}).get("enabled"):
            return kind
    return "fp32"


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage, 0 for none."""
    return config.get("zero_optimization", {}).get("stage", 0)


def with_bucket_for(zero: dict[str, Any], trained: int) -> dict[str, Any]:
    """DeepSpeed's zero_optimization with a gradient bucket that is no larger than all gradients.

    DeepSpeed allocates the complete bucket, 2 GB in float32 by default, even for a soft prompt of some thousand
    elements. `trained` is the number of trained elements.
    """
    return {**zero, "reduce_bucket_size": min(int(zero.get("reduce_bucket_size", 5e8)), trained)}


def with_precision(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """The configuration in another precision."""
    if kind == precision(config):
        return config
    changed = {key: value for key, value in config.items() if key not in ("fp16", "bf16")}
    if kind != "fp32":
        changed[kind] = {"enabled": True}
        if not zero_stage(changed):
            changed["zero_optimization"] = {"stage": 1}
    return changed


def prepare_deepspeed(device: torch.device):
    """Import DeepSpeed so that it neither compiles anything nor talks while it works."""
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # it would compile a collective for shared memory
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
    return deepspeed
