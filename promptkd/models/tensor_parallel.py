"""Tensor parallelism: several ranks hold a model together, each some heads and feed-forward units of every layer.

The table of `weights.families` says where each tensor is cut, so a model can be read from shards of any size or from
whole files; each rank reads its own part only. A layer's first products are cut by outputs, its last one by inputs: the
forward pass adds up what the ranks have at the end of a block, the backward pass at its beginning (Shoeybi et al.,
Megatron-LM, 2019). All ranks get the same sums, hence the same states. Embeddings and head stand whole on every rank,
so losses and decoding are those of one rank. All ranks of a group draw the same dropout masks; in attention that makes
them alike for heads of different ranks.

DeepSpeed's AutoTP is not used: it knows no fused `Conv1D`, cuts models that are in memory whole, takes one size for
all engines of a process, and would cut the head that the losses read.
"""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from promptkd.distributed.ranks import Ranks
from promptkd.distributed.rendezvous import tensor_parallel_groups
from promptkd.errors import UserError
from promptkd.models.checks import check_unexpected
from promptkd.weights import checks
from promptkd.weights.families import FAMILIES, HEAD, Cut, Family
from promptkd.weights.reader import SourceModel, inside, model_files, read_json, shard_folder


class TensorParallelGroup:
    """The `size` neighbouring ranks that hold a model together; this is number `rank` of them.

    DeepSpeed takes it as its model parallel unit and asks it what is below.
    """

    def __init__(self, ranks: Ranks, size: int) -> None:
        world = ranks.world
        self.size, self.rank, self.data_rank, self.data_size = (
            size,
            world.dp_rank % size,
            world.dp_rank // size,
            world.dp_size // size,
        )
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
    """The ranks that hold a model together with this one, None if there are no others. All ranks call it."""
    return TensorParallelGroup(ranks, size) if size > 1 else None


class _SumForward(torch.autograd.Function):
    """The sum of the ranks' values; the gradient of it is each rank's."""

    @staticmethod
    def forward(ctx, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        dist.all_reduce(values, group=group)
        ctx.mark_dirty(values)
        return values

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _SumBackward(torch.autograd.Function):
    """The same values; the gradient is the sum of the ranks'."""

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
    """A Linear or Conv1D of which this rank holds some outputs or, `by_inputs`, some inputs; then its bias is whole."""

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


def load_shard(path: str, config, dtype: torch.dtype, group: TensorParallelGroup, option: str) -> PreTrainedModel:
    """This rank's part of the causal LM in folder `path`, in `dtype`, on the CPU; its `config` is the whole model's.

    Reads the whole model's files or, where there are none, shards (mp<N>/) of this or any other size. option: the
    folder's, for messages. Raises UserError when the size does not divide heads or feed-forward units, and when files
    are missing or not one model's.
    """
    model, source, names = open_model(path, config, dtype, group.size, option)
    shard(model, group)
    fill(model, source, names, dtype)
    return model


def open_model(
    path: str, config, dtype: torch.dtype, size: int, option: str
) -> tuple[PreTrainedModel, SourceModel, dict[str, str]]:
    """The model on `meta`, its weights' files, found fit for `size` ranks, and its tensors' names (the head's unless it
    is tied). Arguments and errors are `load_shard`'s.
    """
    root, size_option = Path(path), option.replace("path", "parallel-size")
    if config.model_type not in FAMILIES:
        raise UserError(f"{option} {path}: {size_option} is for {', '.join(FAMILIES)}, not {config.model_type}")
    if not root.is_dir():
        raise UserError(
            f"{option} {path}: {size_option} needs a folder: `hf download {path} --local-dir ...` makes one"
        )
    source = open_source(root, size, FAMILIES[config.model_type])
    described = read_json(inside(root, "config.json"))
    checks.check_model(source, described, size, size_option, replicated=("vocab",))
    names = checks.output_names(source, described, 1)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # each family checks its sizes in its own way
        raise UserError(f"{option} {path}: config.json describes no possible model ({error}): fetch it anew") from None
    _check_shapes(model, source, names, f"{option} {path}")
    check_unexpected(model, names.keys() - dict(model.named_parameters()).keys() - {HEAD}, f"{option} {path}")
    if (root / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(root)
    return model, source, names


def _check_shapes(model: PreTrainedModel, source: SourceModel, names: Container[str], where: str) -> None:
    """Raise UserError unless `source` has every tensor of the model (a tied head is not in `names`) in its shape."""
    for name, parameter in model.named_parameters():
        if name == HEAD and HEAD not in names:
            continue
        if name not in names or source.shape(name, 1) != tuple(parameter.shape):
            raise UserError(f"{where}: {name} is missing or misshapen: fetch it anew")


def open_source(root: Path, size: int, family: Family) -> SourceModel:
    """The whole model or, where there is none, the shards of `size` or else of the smallest other size."""
    sizes = sorted(int(match[1]) for path in root.iterdir() if (match := re.fullmatch(r"mp(\d+)", path.name)))
    if model_files(root) or not sizes:
        return SourceModel(root, 1, family)
    return SourceModel(root, size if shard_folder(root, size).is_dir() else sizes[0], family)


def shard(model: PreTrainedModel, group: TensorParallelGroup) -> None:
    """Put sharded layers in the place of the whole ones of a model without weights. `model.tensor_group` is `group`."""
    kind = model.config.model_type
    for name, module in list(model.named_modules()):
        cut = _cut(kind, f"{name}.weight") if isinstance(module, (nn.Linear, Conv1D)) else None
        if cut is not None:
            by_inputs = (cut.axis == 0) == isinstance(module, Conv1D)
            model.set_submodule(name, ShardedLayer(module, by_inputs, group))
        if FAMILIES[kind].split(name)[1] in FAMILIES[kind].blocks:
            model.get_submodule(name).register_forward_pre_hook(_sum_gradients(group), with_kwargs=True)
        for count in ("num_heads", "split_size"):  # what gpt2 and opt reshape by; the others look at the tensors
            if isinstance(getattr(module, count, None), int):
                setattr(module, count, getattr(module, count) // group.size)
    model.tensor_parallel_group = group


def _sum_gradients(group: TensorParallelGroup):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (_SumBackward.apply(args[0], group.group), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _SumBackward.apply(kwargs["hidden_states"], group.group)}

    return hook


def fill(model: PreTrainedModel, source: SourceModel, names: Container[str], dtype: torch.dtype) -> None:
    """Read the weights of a model that `shard` was called for; `names` has the head's unless it is tied."""
    kind, group = model.config.model_type, model.tensor_parallel_group
    for name, parameter in list(model.named_parameters()):
        if name == HEAD and HEAD not in names:
            continue
        cut = _cut(kind, name)
        size, rank = (1, 0) if cut is None else (group.size, group.rank)
        owner, _, leaf = name.rpartition(".")
        made = nn.Parameter(source.piece(name, size, rank).to(dtype), parameter.requires_grad)
        made.model_parallel = cut is not None  # DeepSpeed counts the others once in a gradient's norm
        setattr(model.get_submodule(owner), leaf, made)
    model.tie_weights()


def is_tp_sharded(parameter: nn.Parameter) -> bool:
    """Whether the group's other ranks hold other parts of the parameter."""
    return getattr(parameter, "model_parallel", False)


def _cut(kind: str, name: str) -> Cut | None:
    """How a parameter is cut: as in shards, but embeddings and head are whole."""
    family = FAMILIES[kind]
    return None if family.split(name)[0] is None else family.cut(name)


@torch.no_grad()
def gather_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The whole model's weights on the CPU of the first rank, nothing on the others. All ranks call it."""
    group, state = model.tensor_parallel_group, {}
    if group.data_rank:  # the first group has all
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
        state[HEAD] = state[FAMILIES[model.config.model_type].embedding]  # one tensor, for it is to be saved once
    return state
