"""Checks of a loaded model: a supported architecture, weights that fit, finite numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from promptkd.errors import UserError

# Buffers that earlier versions of transformers saved and that are computed now.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias|h\.\d+\.attn\.bias|attention\.bias)$")


class _Output(BaseModelOutputWithPast):
    """The output of a body. Fields that only some families' outputs have are None."""

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def check_family(model: PreTrainedModel, option: str) -> None:
    """Check that a model is a body followed by a linear head, and that it accepts position ids.

    Losses compute logits from hidden states and head. Anything that a model does around its head would be lost
    silently: Gemma 2 and Cohere cap or scale logits, MiniCPM scales hidden states. To detect this without running the
    body, body and head are made to return given values, which have to arrive unchanged.

    Raises:
        UserError: If the family is not supported.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise _unsupported(model, option, f"its output layer is not linear but {type(head).__name__}")
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise _unsupported(model, option, "it takes no position_ids, which prompts of different lengths need")
    states = torch.linspace(-1, 1, head.in_features).to(head.weight)[None, None]
    logits = torch.linspace(-100, 100, head.out_features).to(head.weight)[None, None]
    head_inputs: list[Tensor] = []
    bodies = [each for each in model.modules() if isinstance(each, PreTrainedModel) and each is not model]
    hooks = [
        head.register_forward_pre_hook(lambda _, inputs: head_inputs.append(inputs[0])),
        head.register_forward_hook(lambda *_: logits.clone()),
    ]
    try:
        for body in bodies:
            body.forward = lambda *_, **__: _Output(last_hidden_state=states.clone())
        ids = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
        output = model(input_ids=ids, use_cache=False).logits
    finally:
        for body in bodies:
            del body.forward  # restores the method of the class
        for hook in hooks:
            hook.remove()
    if not (torch.equal(head_inputs[0], states) and torch.equal(output.to(logits), logits)):
        raise _unsupported(model, option, "it soft-caps or scales around its output layer, unseen by the losses")


def _unsupported(model: PreTrainedModel, option: str, reason: str) -> UserError:
    family = model.config.model_type
    return UserError(f"{option}: the family {family} is not supported: {reason}: take a model of another family")


def check_numbers(model: nn.Module, path: str, option: str) -> None:
    """Raise UserError if a parameter holds numbers that are not finite."""
    for name, parameter in model.named_parameters():
        check_number(name, parameter.detach(), path, option)


def check_number(name: str, tensor: Tensor, path: str, option: str) -> None:
    """Raise UserError if the tensor with this name holds numbers that are not finite."""
    if not is_finite(tensor):
        raise UserError(f"{option} {path}: {name} holds numbers that are not finite: take a sound model")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite. Needs no memory of the tensor's size."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    least, largest = tensor.aminmax()
    return bool(torch.isfinite(least) & torch.isfinite(largest))


def check_unexpected(model: PreTrainedModel, names: Iterable[str], where: str) -> None:
    """Raise UserError if weights have no module, because a dropped bias or layer would change every result.

    Args:
        model: The model that was loaded.
        names: Names of the unused tensors. Buffers that are computed now are ignored.
        where: Option and folder of the weights, for the error message.
    """
    patterns = [COMPUTED, *map(re.compile, model._keys_to_ignore_on_load_unexpected or ())]
    unused = sorted(name for name in names if not any(pattern.search(name) for pattern in patterns))
    if unused:
        raise UserError(
            f"{where}: config.json has no place for {len(unused)} tensors of the weights, {unused[0]} first: take the "
            "config.json that belongs to the weights, or take such tensors out of them"
        )
