"""Tensor parallelism: each rank of a group holds some heads and feed-forward units of every layer.

The table in `weights.families` says where each tensor is cut. A model can be read from shards of any size or from
unsharded files, and each rank reads only its own part. The first products of a block are cut by outputs, the last one
by inputs. The forward pass sums over ranks at the end of a block, the backward pass at its beginning (Shoeybi et al.,
Megatron-LM, 2019). All ranks get the same sums and therefore the same hidden states. Embeddings and head are complete
on every rank, so losses and decoding work as on one rank. All ranks of a group draw the same dropout masks. Heads of
different ranks therefore share the masks of attention.

DeepSpeed's AutoTP is not used. It does not support the fused `Conv1D`, needs the complete model in memory, allows one
size for all engines of a process, and would cut the head that the losses read.
"""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from promptkd.distributed.ranks import Ranks
from promptkd.distributed.rendezvous import tensor_parallel_groups
from promptkd.errors import UserError
from promptkd.models.checks import check_unexpected
from promptkd.weights import checks
from promptkd.weights.families import FAMILIES, HEAD, Cut, Family
from promptkd.weights.reader import SourceModel, inside, model_files, read_json, shard_folder


class TensorParallelGroup:
    """The `size` neighboring ranks that hold a model together. This process has the index `rank` among them.

    It is DeepSpeed's model parallel unit (`mpu`), for which the methods below are named.
    """

    def __init__(self, ranks: Ranks, size: int) -> None:
        world = ranks.world
        self.size, self.rank = size, world.dp_rank % size
        self.data_rank, self.data_size = world.dp_rank // size, world.dp_size // size
        self.group, self.data_group = tensor_parallel_groups(world.dp_size, size)

    def get_model_parallel_rank(self) -> int:
        return self.rank

    def get_model_parallel_world_size(self) -> int:
        return self.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group


def tensor_parallel_group(ranks: Ranks, size: int) -> TensorParallelGroup | None:
    """Create this rank's group, or return None if the model is not sharded. All ranks call this."""
    return TensorParallelGroup(ranks, size) if size > 1 else None


def group_of(model: PreTrainedModel) -> TensorParallelGroup | None:
    """Return the ranks that hold a model together, or None if the model is not sharded."""
    return getattr(model, "tensor_parallel_group", None)


class _SumForward(torch.autograd.Function):
    """Sum values over ranks in the forward pass. Pass the gradient on unchanged."""

    @staticmethod
    def forward(ctx, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        dist.all_reduce(values, group=group)
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _SumBackward(torch.autograd.Function):
    """Pass values on unchanged. Sum the gradient over ranks in the backward pass."""

    @staticmethod
    def forward(ctx, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class ShardedLayer(nn.Module):
    """A Linear or Conv1D of which this rank holds some of the outputs or, with `by_inputs`, some of the inputs.

    The bias of a layer that is cut by inputs is complete on every rank.
    """

    def __init__(self, layer: nn.Linear | Conv1D, by_inputs: bool, group: TensorParallelGroup) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.inputs_first = isinstance(layer, Conv1D)
        self.by_inputs, self.group = by_inputs, group

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight.t() if self.inputs_first else self.weight
        if not self.by_inputs:
            return F.linear(inputs, weight, self.bias)
        outputs = _SumForward.apply(F.linear(inputs, weight), self.group.group)
        return outputs if self.bias is None else outputs + self.bias


def load_shard(
    path: str, config: PretrainedConfig, dtype: torch.dtype, group: TensorParallelGroup, option: str
) -> PreTrainedModel:
    """Load this rank's part of a causal language model on the CPU.

    Reads the unsharded files or, if there are none, shards (mp<N>/) of this or any other size.

    Args:
        path: The model's folder.
        config: The complete model's configuration, which the shard keeps.
        dtype: The precision of the weights.
        group: The ranks that hold the model together.
        option: The option that gave the path, for error messages.

    Raises:
        UserError: If the size does not divide heads or feed-forward units, or files are missing or belong to different
            models.
    """
    model, source, names = open_model(path, config, dtype, group.size, option)
    shard(model, group)
    fill(model, source, names, dtype)
    return model


def open_model(
    path: str, config: PretrainedConfig, dtype: torch.dtype, size: int, option: str
) -> tuple[PreTrainedModel, SourceModel, dict[str, str]]:
    """Create a model on `meta` and check that its files fit it and `size` ranks.

    Arguments and errors are those of `load_shard`.

    Returns:
        The model, its files, and the names of its tensors. A tied head is not among them.
    """
    root, size_option = Path(path), option.replace("path", "parallel-size")
    if config.model_type not in FAMILIES:
        raise UserError(f"{option} {path}: {size_option} is for {', '.join(FAMILIES)}, not {config.model_type}")
    if not root.is_dir():
        raise UserError(
            f"{option} {path}: {size_option} needs a folder: `hf download {path} --local-dir ...` makes one"
        )
    source = open_source(root, size, FAMILIES[config.model_type])
    config_json = read_json(inside(root, "config.json"))
    checks.check_model(source, config_json, size, size_option, replicated=("vocab",))
    names = checks.output_names(source, config_json, 1)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # Each family checks its sizes with other exceptions.
        raise UserError(f"{option} {path}: config.json is not valid ({error}): download it again") from None
    _check_shapes(model, source, names, f"{option} {path}")
    check_unexpected(model, names.keys() - dict(model.named_parameters()).keys() - {HEAD}, f"{option} {path}")
    if (root / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(root)
    return model, source, names


def _check_shapes(model: PreTrainedModel, source: SourceModel, names: Container[str], where: str) -> None:
    """Raise UserError unless `source` has every tensor of the model in its shape, except for a tied head."""
    for name, parameter in model.named_parameters():
        if name == HEAD and HEAD not in names:
            continue
        if name not in names or source.shape(name, 1) != tuple(parameter.shape):
            raise UserError(f"{where}: {name} is missing or misshapen: download the model again")


def open_source(root: Path, size: int, family: Family) -> SourceModel:
    """Open the unsharded model or, if there is none, the shards of `size` or else of the smallest other size."""
    sizes = sorted(int(match[1]) for path in root.iterdir() if (match := re.fullmatch(r"mp(\d+)", path.name)))
    if model_files(root) or not sizes:
        return SourceModel(root, 1, family)
    return SourceModel(root, size if shard_folder(root, size).is_dir() else sizes[0], family)


def shard(model: PreTrainedModel, group: TensorParallelGroup) -> None:
    """Replace layers of a model without weights by sharded ones, and set the model's `tensor_parallel_group`."""
    kind = model.config.model_type
    for name, module in list(model.named_modules()):
        cut = _cut(kind, f"{name}.weight") if isinstance(module, (nn.Linear, Conv1D)) else None
        if cut is not None:
            by_inputs = (cut.axis == 0) == isinstance(module, Conv1D)
            model.set_submodule(name, ShardedLayer(module, by_inputs, group))
        if FAMILIES[kind].split(name)[1] in FAMILIES[kind].blocks:
            model.get_submodule(name).register_forward_pre_hook(_sum_gradients(group), with_kwargs=True)
        for count in ("num_heads", "split_size"):  # used by gpt2 and opt to reshape
            if isinstance(getattr(module, count, None), int):
                setattr(module, count, getattr(module, count) // group.size)
    cast(Any, model).tensor_parallel_group = group


def _sum_gradients(group: TensorParallelGroup):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (_SumBackward.apply(args[0], group.group), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _SumBackward.apply(kwargs["hidden_states"], group.group)}

    return hook


def fill(model: PreTrainedModel, source: SourceModel, names: Container[str], dtype: torch.dtype) -> None:
    """Read the weights of a model that `shard` has prepared. A tied head is not in `names`."""
    kind, group = model.config.model_type, cast(TensorParallelGroup, group_of(model))
    for name, parameter in list(model.named_parameters()):
        if name == HEAD and HEAD not in names:
            continue
        cut = _cut(kind, name)
        size, rank = (1, 0) if cut is None else (group.size, group.rank)
        part = nn.Parameter(source.piece(name, size, rank).to(dtype), parameter.requires_grad)
        # DeepSpeed counts parameters without this mark once in the norm of the gradient.
        cast(Any, part).model_parallel = cut is not None
        set_parameter(model, name, part)
    model.tie_weights()


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the parameter with this name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def is_tp_sharded(parameter: nn.Parameter) -> bool:
    """Whether the other ranks of the group hold other parts of the parameter."""
    return getattr(parameter, "model_parallel", False)


def _cut(kind: str, name: str) -> Cut | None:
    """Look up how a parameter is cut. Unlike in shards, embeddings and head are complete on every rank."""
    family = FAMILIES[kind]
    return None if family.split(name)[0] is None else family.cut(name)


@torch.no_grad()
def gather_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gather the complete model's weights on the CPU of the first rank. All ranks call this.

    Returns:
        The weights on the first rank, an empty dictionary on the others.
    """
    group = cast(TensorParallelGroup, group_of(model))
    state: dict[str, Tensor] = {}
    if group.data_rank:  # The first group has everything.
        return state
    for name, value in model.state_dict().items():
        cut = _cut(model.config.model_type, name)
        if cut is not None:
            parts = [torch.empty_like(value) for _ in range(group.size)]
            dist.all_gather(parts, value.contiguous(), group=group.group)
            blocks = [part.chunk(cut.blocks, cut.axis) for part in parts]
            value = torch.cat([part[i] for i in range(cut.blocks) for part in blocks], cut.axis)
        if group.rank == 0:
            state[name] = value.cpu()
    if state and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        state[HEAD] = state[FAMILIES[model.config.model_type].embedding]  # the same tensor, so that it is saved once
    return state
