"""LoRA adapters: a folder with an adapter stands for its base model with the adapter merged into the weights."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from transformers import PreTrainedModel

from promptkd.errors import UserError
from promptkd.utils.strict_json import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# If one of these is beside the adapter, the folder holds two models, and loaders differ in which one they take.
MODELS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_adapter(path: str) -> bool:
    """Whether the folder holds an adapter instead of a model."""
    return os.path.isfile(os.path.join(path, CONFIG))


def base_of(path: str, option: str) -> str:
    """Return the base model's folder or hub name if `path` holds an adapter, and `path` itself otherwise.

    Args:
        path: A folder or a hub name.
        option: The option that gave the path, for error messages.

    Raises:
        UserError: If the adapter is not LoRA for a causal language model, is incomplete or names no base model.
    """
    if not is_adapter(path):
        return path
    folder = Path(path)
    config = read_object(folder / CONFIG, f"{option} needs a LoRA adapter as PEFT saves it")
    kind, task, base = (config.get(key) for key in ("peft_type", "task_type", "base_model_name_or_path"))
    if kind != "LORA":
        raise UserError(
            f"{option} {path} holds an adapter of type {kind}, not a model: name the folder of a model or of LoRA"
        )
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{option} {path}: the adapter's task is {task}, not CAUSAL_LM: name another adapter")
    if config.get("megatron_config") is not None:
        raise UserError(f"{option} {path}: adapters for Megatron layers are not supported: name another adapter")
    beside = [name for name in MODELS if (folder / name).exists()]
    if beside:
        raise UserError(
            f"{option} {path} holds {CONFIG} and {beside[0]}: put adapter and model into folders of their own"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{option} {path}: the adapter lacks {WEIGHTS}: save it with safe_serialization=True")
    if not isinstance(base, str) or not base:
        raise UserError(f"{option} {path}: {CONFIG} lacks base_model_name_or_path: add the base model's folder")
    if not os.path.isdir(base) and (folder / base).is_dir():
        base = str(folder / base)
    if is_adapter(base):
        raise UserError(f"{option} {path}: its base model {base} is an adapter itself: merge that one first")
    return base


def merge(model: PreTrainedModel, path: str, option: str) -> PreTrainedModel:
    """Merge the LoRA adapter in a folder into its base model.

    Args:
        model: The base model.
        path: The adapter's folder.
        option: The option that gave the path, for error messages.

    Raises:
        UserError: If the adapter and the base model do not fit together.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing tensors, which are an error below
            adapted = PeftModel.from_pretrained(model, path)
        with safe_open(Path(path) / WEIGHTS, "pt") as file:
            stored = set(file.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unmatched = sorted(stored ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys())
        if unmatched:
            raise ValueError(f"{len(unmatched)} tensors are missing or have no place, {unmatched[0]} first")
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT raises many types.
        raise UserError(
            f"{option} {path}: the adapter does not fit its base model {model.name_or_path}: {error}"
        ) from None
    return merged.requires_grad_(True)  # PEFT froze the base model
