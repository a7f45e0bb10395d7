"""A model that no rank holds whole: ZeRO-3 shares each tensor out as soon as it is read.

DeepSpeed alone would have the whole model on every rank's device first. Here the layers' weights stay unread until the
engine is made, which reads and shares them out one by one; embeddings and head, which are looked at before that, are
read at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd.models.tensor_parallel import open_model
from promptkd.utils.memory import give_back_freed_memory
from promptkd.weights.families import FAMILIES, HEAD


def load_deferred(
    path: str, config, dtype: torch.dtype, option: str, check: Callable[[str, Tensor], None]
) -> PreTrainedModel:
    """The causal LM in folder `path`, in `dtype` on the CPU, its layers' weights on `meta`.

    Its attribute `unread` reads one of them by name. check: called with every tensor that is read. Raises UserError
    when the family's layout is not known, and when files are missing or not one model's.
    """
    model, source, names = open_model(path, config, dtype, 1, option)
    family = FAMILIES[config.model_type]

    def read(name: str) -> Tensor:
        value = source.piece(name, 1, 0).to(dtype)
        check(name, value)
        return value

    for name, parameter in list(model.named_parameters()):
        if family.split(name)[0] is None and not (name == HEAD and HEAD not in names):
            _put(model, name, nn.Parameter(read(name), parameter.requires_grad))
    model.tie_weights()
    model.unread = read
    return model


def partition_params(model: nn.Module, settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Share the parameters of a `LanguageModel` out over all ranks, one after another. All ranks call it.

    settings: DeepSpeed's, with ZeRO-3. What a device holds at most is its share and the largest tensor.
    """
    import deepspeed

    shared = None
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = model.model.unread(name.removeprefix("model."))
            parameter = nn.Parameter(value, parameter.requires_grad)
            _put(model, name, parameter)
        parameter.data = parameter.data.to(dtype)
        if shared is None:
            deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=settings)
            shared = parameter
        else:
            shared.convert_to_zero_parameters(param_list=[parameter])
        give_back_freed_memory()  # whole tensors leave holes, where shares of the next ones would not all go
    for buffer in model.buffers():  # DeepSpeed leaves a model alone that is shared out
        buffer.data = buffer.data.to(device)
    vars(model.model).pop("unread", None)  # it holds the files open


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)
