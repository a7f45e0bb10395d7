"""What is checked before anything is written: that the shards are one whole model, and that the new size fits it."""

from __future__ import annotations

import math
from pathlib import Path

from promptkd.errors import UserError
from promptkd.weights.layout import HEAD, Family
from promptkd.weights.reader import SourceModel
from promptkd.weights.tensor_files import same_bytes

UNITS = {
    "heads": "attention heads",
    "kv_heads": "key-value heads",
    "ffn": "feed-forward units",
    "vocab": "vocabulary entries",
}


def check_shards(model: SourceModel) -> None:
    """All shards hold the same names, shapes and types, and hold the tensors that stand whole bit for bit alike."""
    first = model.shards[0]
    for other in model.shards[1:]:
        for name in sorted(first.shapes.keys() ^ other.shapes.keys()):
            lacks, holds = (other, first) if name in first.shapes else (first, other)
            raise UserError(f"{lacks.where} lacks {name}, which {holds.where.name} holds: shards of two models?")
        for name, shape in first.shapes.items():
            here, there = (shape, first.dtypes[name]), (other.shapes[name], other.dtypes[name])
            if here != there:
                raise UserError(
                    f"{name} is {_said(*here)} in {first.where} but {_said(*there)} in {other.where.name}: "
                    "shards of two models?"
                )
    for name in model.names:
        if model.family.cut(name) is None:
            for other in model.shards[1:]:
                if not same_bytes(first.tensor(name), other.tensor(name)):
                    raise UserError(
                        f"{name} stands whole in every shard but differs between {first.where} and "
                        f"{other.where.name}: shards of two models, or a shard trained by itself"
                    )
            model.release()


def _said(shape: tuple[int, ...], dtype: object) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def check_names(model: SourceModel, config: dict | None) -> None:
    """Every tensor is the family's, no layer lacks one that another has, and the layers are as many as config says."""
    family, where = model.family, model.shards[0].where
    layers: dict[int, set[str]] = {}
    for name in model.names:
        cut = family.cut(name)
        if cut is not None and len(model.shape(name, 1)) <= cut.axis:
            raise UserError(f"{where}: {name} has too few dimensions to be cut along dimension {cut.axis}")
        layer, rest = family.split(name)
        if layer is not None:
            layers.setdefault(layer, set()).add(rest)
    if family.embedding not in model.names:
        raise UserError(f"{where} lacks {family.embedding}")
    count = _number(config, family, "layers") or max(layers, default=-1) + 1
    every = set().union(*layers.values())
    for layer in range(count):
        for rest in sorted(every - layers.get(layer, set())):
            raise UserError(f"{where} lacks {rest} of layer {layer}: the weights are incomplete")
    if not layers or max(layers) >= count:
        raise UserError(f"{where} holds {len(layers)} layers, config.json says {count}: weights of another model")


def check_geometry(
    model: SourceModel,
    config: dict | None,
    target: int,
    option: str = "--target_mp_size",
    whole: tuple[str, ...] = (),
) -> None:
    """The widths are those of `config` and no attention head or other unit would be cut through at size `target`.

    option: what gave the size, for messages. whole: units that are not cut at this size.

    Without a config.json the number of heads is unknown: then only sizes that join whole shards are possible.
    """
    widths = _widths(model)
    if config is None:
        if model.size % target:
            raise UserError(
                f"{model.root} has no config.json, without which the attention heads are unknown: put the model's there"
            )
        return
    units = _units(model.family, config, widths, model.shards[0].where)
    units = {unit: count for unit, count in units.items() if unit not in whole}
    misfits = [f"{units[unit]} {said}" for unit, said in UNITS.items() if units.get(unit, target) % target]
    if misfits:
        common = math.gcd(*units.values())
        sizes = [size for size in range(1, common + 1) if common % size == 0][:12]
        raise UserError(
            f"{option} {target} does not divide the model's {' and '.join(misfits)}; "
            f"sizes that would: {', '.join(map(str, sizes))}"
        )


def _widths(model: SourceModel) -> dict[str, int]:
    """The whole width of each unit's axis (of one block of it), measured on the tensors; UserError if they disagree."""
    widths: dict[str, tuple[int, str]] = {}
    for name in model.names:
        cut = model.family.cut(name)
        if cut is None:
            continue
        total = model.shape(name, 1)[cut.axis]
        width, first = widths.setdefault(cut.unit, (total // cut.blocks, name))
        if total != width * cut.blocks or model.shards[0].shapes[name][cut.axis] % cut.blocks:
            raise UserError(f"{model.shards[0].where}: the shapes of {name} and {first} do not fit together")
    return {unit: width for unit, (width, _) in widths.items()}


def _units(family: Family, config: dict, widths: dict[str, int], where: Path) -> dict[str, int]:
    """How many of each unit there are; UserError where the tensors' widths are not what `config` says."""
    heads = _number(config, family, "heads")
    if not heads:
        raise UserError(f"config.json lacks {family.fields['heads']}: take the model's own config.json")
    hidden = _number(config, family, "hidden")
    head_dim = _number(config, family, "head_dim") or (hidden // heads if hidden else widths["heads"] // heads)
    said = {
        "heads": heads * head_dim,
        "kv_heads": (_number(config, family, "kv_heads") or 0) * head_dim,
        "ffn": _number(config, family, "ffn"),
        "vocab": _number(config, family, "vocab"),
    }
    for unit, width in widths.items():
        expected = said[unit] or width
        if width != expected or not head_dim or ("heads" in unit and width % head_dim):
            raise UserError(
                f"{where}: the tensors cut by {UNITS[unit]} are {width} wide in all, but config.json says {expected}: "
                "the shards or the config.json are another model's, or not all shards are there"
            )
    return {unit: width // head_dim if "heads" in unit else width for unit, width in widths.items()}


def _number(config: dict | None, family: Family, key: str) -> int | None:
    """A positive whole number from config.json; None where it is absent or null."""
    field = family.fields.get(key)
    value = (config or {}).get(field)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {field} is {value!r}, not a whole number above 0")
    return value


def is_tied(family: Family, config: dict | None) -> bool:
    """Whether the output head is the token embedding."""
    return bool((config or {}).get("tie_word_embeddings", family.tied))


def output_names(model: SourceModel, config: dict | None, target: int) -> dict[str, str]:
    """What the output holds: each tensor's name, and the name of the source's tensor it is made from.

    A tied head is written into shards that cut it, as the published ones have it, and left out of a whole model, whose
    loader makes it from the embedding. UserError where a head is missing, or is not the embedding it is tied to.
    """
    family, names = model.family, {name: name for name in model.names}
    if not is_tied(family, config):
        if HEAD not in names:
            raise UserError(
                f"{model.shards[0].where} lacks {HEAD}, and "
                + (f"{model.root} has no config.json to tie it" if config is None else "config.json does not tie it")
                + " to the embedding: the weights are incomplete"
            )
    elif target > 1 and family.head_cut:
        names.setdefault(HEAD, family.embedding)
    elif names.pop(HEAD, None):
        _check_head(model)
    return names


def _check_head(model: SourceModel) -> None:
    for shard in model.shards:
        alike = shard.shapes[HEAD] == shard.shapes[model.family.embedding] and (
            shard.dtypes[HEAD] == shard.dtypes[model.family.embedding]
        )
        if not alike or not same_bytes(shard.tensor(HEAD), shard.tensor(model.family.embedding)):
            raise UserError(
                f"{HEAD} differs from the embedding in {shard.where}, though the two are tied: "
                'set "tie_word_embeddings": false in config.json if the model was trained so'
            )
        model.release()
