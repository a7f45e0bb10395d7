"""LoRA adapters (Hu et al., 2022): trained in a student, saved in PEFT's format, and merged into weights.

A folder with an adapter stands for its base model with the adapter merged into the weights.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from promptkd.config.lora_options import LoraSettings
from promptkd.errors import UserError, is_out_of_memory
from promptkd.models.checks import check_numbers
from promptkd.models.validation import looks_local
from promptkd.utils.strict_json import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNSUPPORTED = ("alora_invocation_tokens", "layer_replication", "megatron_config")  # fields of adapter_config.json
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
    config = read_object(Path(path, CONFIG), f"{option} needs a LoRA adapter as PEFT saves it")
    kind, task, base = (str(config.get(key) or "") for key in ("peft_type", "task_type", "base_model_name_or_path"))
    base = next((each for each in (base, os.path.join(path, base)) if base and os.path.isdir(each)), base)
    is_lost = looks_local(base) and not os.path.isdir(base)
    kinds = [name for name in UNSUPPORTED if config.get(name) is not None]
    models = [name for name in MODELS if Path(path, name).exists()]
    problems = [
        (kind != "LORA", f"it is an adapter of type {kind}, not a model: name the folder of a model or of LoRA"),
        (task not in ("", "CAUSAL_LM"), f"the adapter's task is {task}, not CAUSAL_LM: name another adapter"),
        (kinds, f"adapters with {', '.join(kinds)} are not supported: name another adapter"),
        (models, f"it holds {CONFIG} and {', '.join(models)}: put adapter and model into folders of their own"),
        (not Path(path, WEIGHTS).is_file(), f"the adapter lacks {WEIGHTS}: save it with safe_serialization=True"),
        (not base, f"{CONFIG} lacks base_model_name_or_path: add the base model's folder"),
        (is_lost, f"its base model {base} is no such folder: correct base_model_name_or_path in its {CONFIG}"),
        (is_adapter(base), f"its base model {base} is an adapter itself: merge that one first"),
    ]
    for is_there, problem in problems:
        if is_there:
            raise UserError(f"{option} {path}: {problem}")
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
    with _errors(model, path, option):
        complete: PreTrainedModel = _load_adapter(model, path).merge_and_unload()
    return complete.requires_grad_(True)  # PEFT froze the base model


@contextlib.contextmanager
def _errors(model: PreTrainedModel, path: str, option: str) -> Iterator[None]:
    """Turn the errors of PEFT, which have many types, into UserError. Hide its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing tensors, which are an error here
            yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"{option} {path}: the adapter does not fit its base model {model.name_or_path}: {str(error)[:400]}: "
            f"correct its {CONFIG}, or name another adapter"
        ) from None


def _load_adapter(model: PreTrainedModel, path: str, dropout: float = 0.0) -> PeftModel:
    """Add the adapter in a folder to a model, in place, with a dropout rate of its own. Raises errors of any type."""
    config = LoraConfig.from_pretrained(path)
    config.lora_dropout = dropout
    adapted = PeftModel.from_pretrained(model, path, config=config, is_trainable=True)
    placed = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    copies = {name for name in adapted.state_dict() if name.endswith(".base_layer.weight")}  # of embeddings and head
    with safe_open(Path(path, WEIGHTS), "pt") as file:
        unmatched = sorted((set(file.keys()) ^ placed) - copies)
    if unmatched:
        raise ValueError(f"{len(unmatched)} tensors are missing or have no place, {unmatched[0]} first")
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(isinstance(end, LoraLayer) for end in ends) and ends[0].weight is ends[1].weight:
        raise ValueError("it changes only one of embeddings and head, which share their weights")
    return adapted


def add_lora(model: PreTrainedModel, options: LoraSettings, path: str, seed: int) -> None:
    """Freeze a student and add trainable LoRA adapters, in place.

    Args:
        model: The student, or the base model if `path` is an adapter.
        options: The adapters' options.
        path: The student's folder. If it holds an adapter, its training continues.
        seed: The seed of new adapters, which have to be the same on all ranks.

    Raises:
        UserError: If the options do not fit the student or its adapter.
    """
    if is_adapter(path):
        _continue_adapter(model, options, path)
        return
    linear = {name for name, module in model.base_model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    if options.lora_r > (width := model.config.get_text_config().hidden_size):
        raise UserError(f"--lora-r {options.lora_r} exceeds the student's width, {width}: give a smaller rank")
    if unknown := set(options.lora_target or ()) - set(leaves):
        raise UserError(
            f"--lora-target {min(unknown)}: the student has no such linear layer: name some of {', '.join(leaves)}"
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=options.lora_r,
        lora_alpha=options.lora_alpha or 2 * options.lora_r,  # type: ignore[arg-type]  # PEFT only divides it
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_target or leaves,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT itself sets fan_in_fan_out for GPT-2's layers
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def _continue_adapter(model: PreTrainedModel, options: LoraSettings, path: str) -> None:
    """Add the adapter in a folder to its base model, to train it further."""
    saved = read_object(Path(path, CONFIG), "save it again")
    rank, alpha = saved.get("r"), saved.get("lora_alpha")
    if options.lora_r != rank or options.lora_target or options.lora_alpha not in (None, alpha):
        raise UserError(
            f"--model-path {path} is an adapter with its own rank, alpha and layers: give --lora-r {rank}, and "
            "leave --lora-alpha and --lora-target out"
        )
    if saved.get("use_dora") and options.student_quantization == "8bit":  # PEFT loses the layers' scales on CPUs
        raise UserError(f"--student-quantization 8bit does not go with {path}, an adapter of DoRA: take 4bit")
    with _errors(model, path, "--model-path"):
        _load_adapter(model, path, options.lora_dropout)
    check_numbers(model, path, "--model-path")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    are_linear = all(isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)) for layer in adapted)
    if not are_linear or model.get_output_embeddings() in adapted or not all(".lora_" in name for name in trained):
        raise UserError(
            f"--model-path {path}: the adapter is not only of linear layers below the head: merge it into its base "
            "model and name that folder"
        )
    with _errors(model, path, "--model-path"):
        for layer in adapted:  # one at a time, because merging needs a copy
            with merged(layer):
                pass


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merge LoRA adapters into the weights for the length of a block, and restore the weights bit for bit.

    Decoding is faster without the adapters' small products. The weights keep their places in memory. Quantized weights
    are not merged, because merging would round them again.
    """
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer) and not module.merged]
    layers = [layer for layer in adapted if layer.get_base_layer().weight.is_floating_point()]
    kept = [(each, each.detach().clone()) for layer in layers for each in layer.get_base_layer().parameters()]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.merge()
        yield
    finally:
        for parameter, original in kept:
            parameter.data.copy_(original)
        for layer in layers:
            layer.merged_adapters.clear()


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights inside of a `merged` block under the names that they have without adapters."""
    state = model.state_dict()
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def save_adapter(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """Write the LoRA adapters of a model with these weights. `PeftModel.from_pretrained(base, folder)` reads them."""
    config, base = copy.copy(cast(Any, model).peft_config["default"]), str(model.name_or_path)
    config.inference_mode = True
    config.base_model_name_or_path = lasting_path(base)
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(model, state, save_embedding_layers=False)
    tensors = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def lasting_path(path: str) -> str:
    """Return a path that does not depend on the working directory, or a hub name unchanged."""
    return os.path.abspath(path) if os.path.isdir(path) else path
