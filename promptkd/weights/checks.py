"""Check a model on disk before it is converted or loaded in shards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from promptkd.errors import UserError
from promptkd.weights.families import HEAD, Family
from promptkd.weights.reader import SourceModel
from promptkd.weights.safetensors_io import have_same_bytes

UNITS = {
    "heads": "attention heads",
    "kv_heads": "key-value heads",
    "ffn": "feed-forward units",
    "vocab": "vocabulary entries",
}


def check_model(
    model: SourceModel,
    config: Mapping[str, Any] | None,
    target: int,
    option: str = "--target_mp_size",
    replicated: tuple[str, ...] = (),
) -> None:
    """Check that the files are one complete model, the one that `config` describes, and that the target size fits it.

    Args:
        model: The model on disk.
        config: The content of config.json, or None.
        target: The target's tensor-parallel size.
        option: The option that gave the size, for messages.
        replicated: Units that are not cut at this size.

    Raises:
        UserError: If a check fails.
    """
    _check_names(model, config)
    _check_geometry(model, config, target, option, replicated)
    _check_shards(model)


def _check_names(model: SourceModel, config: Mapping[str, Any] | None) -> None:
    """Check the names: all are the family's, every layer has the same ones, and no layer is missing."""
    family, path = model.family, model.shards[0].path
    layers: dict[int, set[str]] = {}
    for name in model.names:
        cut = family.cut(name)
        if cut is not None and len(model.shape(name, 1)) <= cut.axis:
            raise UserError(f"{path}: {name} has too few dimensions to be cut: use the model's own weights")
        layer, rest = family.split(name)
        if layer is not None:
            layers.setdefault(layer, set()).add(rest)
    if family.embedding not in model.names:
        raise UserError(f"{path} lacks {family.embedding}: the weights are incomplete")
    count = _number(config, family, "layers") or max(layers, default=-1) + 1
    required = set().union(*layers.values())
    for layer in range(count):
        for rest in sorted(required - layers.get(layer, set())):
            raise UserError(f"{path} lacks {rest} of layer {layer}: the weights are incomplete")
    if not layers or max(layers) >= count:
        raise UserError(f"{path} holds {len(layers)} layers, config.json says {count}: weights of another model")


def _check_geometry(
    model: SourceModel, config: Mapping[str, Any] | None, target: int, option: str, replicated: tuple[str, ...]
) -> None:
    """Check that the widths are those of `config` and that the target size cuts no unit, such as an attention head.

    Without config.json the number of heads is unknown. Then only sizes that join complete shards are possible.
    """
    widths = _widths(model)
    if config is None:
        if model.size % target:
            raise UserError(
                f"{model.root} has no config.json, so the number of attention heads is unknown: copy the model's there"
            )
        return
    units = _units(model.family, config, widths, model.shards[0].path)
    units = {unit: count for unit, count in units.items() if unit not in replicated}
    misfits = [f"{units[unit]} {noun}" for unit, noun in UNITS.items() if units.get(unit, target) % target]
    if misfits:
        common = math.gcd(*units.values())
        sizes = [size for size in range(1, common + 1) if common % size == 0][:12]
        raise UserError(
            f"{option} {target} does not divide the model's {' and '.join(misfits)}; "
            f"sizes that would: {', '.join(map(str, sizes))}"
        )


def _check_shards(model: SourceModel) -> None:
    """Check that all shards have the same names, shapes and dtypes, and the same bits in replicated tensors."""
    first = model.shards[0]
    for other in model.shards[1:]:
        for name in sorted(first.layout.keys() ^ other.layout.keys()):
            without, holder = (other, first) if name in first.layout else (first, other)
            raise UserError(f"{without.path} lacks {name}, which {holder.path.name} holds: shards of two models?")
        for name, tensor in first.layout.items():
            if _describe(tensor) != _describe(other.layout[name]):
                raise UserError(
                    f"{name} is {_describe(tensor)} in {first.path} but {_describe(other.layout[name])} in "
                    f"{other.path.name}: shards of two models?"
                )
        for name in model.names:
            if model.family.cut(name) is None and not have_same_bytes(first[name], other[name]):
                raise UserError(
                    f"{name} must be the same in every shard but differs between {first.path} and {other.path.name}: "
                    "shards of two models, or a shard trained separately"
                )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _widths(model: SourceModel) -> dict[str, int]:
    """Measure the complete width of each unit's axis (of one block of it) and check that all tensors agree."""
    widths: dict[str, tuple[int, str]] = {}
    for name in model.names:
        cut = model.family.cut(name)
        if cut is None:
            continue
        total = model.shape(name, 1)[cut.axis]
        width, first = widths.setdefault(cut.unit, (total // cut.blocks, name))
        if total != width * cut.blocks or model.layout[name].shape[cut.axis] % cut.blocks:
            raise UserError(
                f"{model.shards[0].path}: the shapes of {name} and {first} do not fit together: use one model's weights"
            )
    return {unit: width for unit, (width, _) in widths.items()}


def _units(family: Family, config: Mapping[str, Any], widths: dict[str, int], path: Path) -> dict[str, int]:
    """Count each unit, after checking the tensors' widths against `config`."""
    heads = _number(config, family, "heads")
    if not heads:
        raise UserError(f"config.json lacks {family.fields['heads']}: use the model's own config.json")
    hidden = _number(config, family, "hidden")
    head_dim = _number(config, family, "head_dim") or (hidden // heads if hidden else widths["heads"] // heads)
    configured = {
        "heads": heads * head_dim,
        "kv_heads": (_number(config, family, "kv_heads") or 0) * head_dim,
        "ffn": _number(config, family, "ffn"),
        "vocab": _number(config, family, "vocab"),
    }
    for unit, width in widths.items():
        expected = configured[unit] or width
        if width != expected or not head_dim or ("heads" in unit and width % head_dim):
            raise UserError(
                f"{path}: the tensors cut by {UNITS[unit]} are {width} wide in all, but config.json says {expected}: "
                "the shards or the config.json are another model's, or shards are missing"
            )
    return {unit: width // head_dim if "heads" in unit else width for unit, width in widths.items()}


def _number(config: Mapping[str, Any] | None, family: Family, key: str) -> int | None:
    """Read a positive integer from config.json. Return None if it is absent or null."""
    field = family.fields.get(key)
    value = (config or {}).get(field or "")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {field} is {value!r}, not a positive integer: use the model's own config.json")
    return value


def output_names(model: SourceModel, config: Mapping[str, Any] | None, target: int) -> dict[str, str]:
    """List the output's tensors.

    A tied head is written into shards that cut it, like the published ones. A complete model omits it, because its
    loader ties it to the embedding.

    Returns:
        Each tensor's name -> the name of the source tensor that it is made from.

    Raises:
        UserError: If a head is missing, or differs from the embedding to which it is tied.
    """
    family, names = model.family, {name: name for name in model.names}
    if not family.is_tied(config):
        if HEAD not in names:
            raise UserError(
                f"{model.shards[0].path} lacks {HEAD}, and "
                + (f"{model.root} has no config.json to tie it" if config is None else "config.json does not tie it")
                + " to the embedding: the weights are incomplete"
            )
        return names
    for shard in model.shards if HEAD in names else ():
        if not have_same_bytes(shard[HEAD], shard[family.embedding]):
            raise UserError(
                f"{HEAD} differs from the embedding in {shard.path}, though the two are tied: "
                'set "tie_word_embeddings": false in config.json if the model was trained so'
            )
    if target > 1 and family.head_cut:
        names.setdefault(HEAD, family.embedding)
    else:
        names.pop(HEAD, None)
    return names
