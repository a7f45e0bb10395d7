"""Deferred loading for ZeRO-3: each tensor is partitioned as soon as it is read, so no rank holds a complete model.

DeepSpeed by default needs the complete model on every rank's device first. Here the layers' weights stay unread until
the engine starts, which reads and partitions them one by one. Embeddings and head are needed earlier and are read at
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from promptkd.models.tensor_parallel import open_model, set_parameter
from promptkd.utils.memory import give_back_freed_memory
from promptkd.weights.families import FAMILIES, HEAD


def load_deferred(
    path: str, config: PretrainedConfig, dtype: torch.dtype, option: str, check: Callable[[str, Tensor], None]
) -> PreTrainedModel:
    """Load a causal language model on the CPU with the weights of its layers on `meta`.

    The attribute `unread` of the model reads one of these weights by name.

    Args:
        path: The model's folder.
        config: The model's configuration.
        dtype: The precision of the weights.
        option: The option that gave the path, for error messages.
        check: Called with name and value of every tensor that is read.

    Raises:
        UserError: If the family is not in the table of families, or files are missing or belong to different models.
    """
    model, source, names = open_model(path, config, dtype, 1, option)
    family = FAMILIES[config.model_type]

    def read(name: str) -> Tensor:
        value = source.piece(name, 1, 0).to(dtype)
        check(name, value)
        return value

    for name, parameter in list(model.named_parameters()):
        if family.split(name)[0] is None and not (name == HEAD and HEAD not in names):
            set_parameter(model, name, nn.Parameter(read(name), parameter.requires_grad))
    model.tie_weights()
    model.unread = read  # type: ignore[assignment]
    return model


def partition_params(model: nn.Module, settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Partition the parameters of a `LanguageModel` over all ranks, one after another. All ranks call this.

    A device holds at most its own part and the largest tensor.

    Args:
        model: The model, with its unread weights on `meta`.
        settings: Configuration of DeepSpeed, with ZeRO-3.
        dtype: The engine's precision.
        device: The device of this rank.
    """
    import deepspeed

    causal_lm = cast(Any, model.model)
    first = None
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = causal_lm.unread(name.removeprefix("model."))
            parameter = nn.Parameter(value, parameter.requires_grad)
            set_parameter(model, name, parameter)
        parameter.data = parameter.data.to(dtype)
        if first is None:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=settings)
            first = parameter
        else:
            cast(Any, first).convert_to_zero_parameters(param_list=[parameter])
        give_back_freed_memory()  # Complete tensors leave holes in which not all parts of the next ones would fit.
    for buffer in model.buffers():  # DeepSpeed does not move buffers of a model that is partitioned.
        buffer.data = buffer.data.to(device)
    vars(causal_lm).pop("unread", None)  # It keeps the files open.
