"""A model from one tensor-parallel size to another: all checks, then the writing, the verification, the placing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from promptkd.errors import UserError
from promptkd.weights import checks
from promptkd.weights.layout import FAMILIES
from promptkd.weights.output import Target, in_words
from promptkd.weights.reader import FORMATS, SourceModel
from promptkd.weights.tensor_files import inside, read_json
from promptkd.weights.writer import Spec, TensorWriter, nbytes, open_writer

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MAX_FILE_BYTES = 5 * 10**9  # a whole model of more is written as several files with an index


@dataclass(frozen=True)
class Request:
    """What is wanted. `dtype`: keep or a key of TYPES; `format`: a key of FORMATS; `model_type` None: config.json's."""

    input_path: Path
    source_mp_size: int
    target_mp_size: int
    model_type: str | None = None
    output_path: Path | None = None
    format: str = "safetensors"
    dtype: str = "keep"
    overwrite: bool = False


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A disk that is full or a folder that cannot be written is the user's to mend: one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'files'}: {error.strerror or error}") from None


@_plain_errors()
def convert(request: Request, max_file_bytes: int = MAX_FILE_BYTES) -> str:
    """Reshard; a line that says what was read and written. UserError for bad input: then nothing has been written."""
    root, size = request.input_path, request.target_mp_size
    if not root.is_dir():
        raise UserError(f"--input_path {root} is not a folder")
    config = read_json(inside(root, "config.json")) if (root / "config.json").exists() else None
    family = FAMILIES[_model_type(request, config)]
    target = Target(request.output_path or root, size, request.format)
    if size == request.source_mp_size and target.root.resolve() == root.resolve():
        raise UserError(f"source and target are both of size {size}: give an --output_path to change the format alone")
    model = SourceModel(root, request.source_mp_size, family)
    checks.check_names(model, config)
    checks.check_geometry(model, config, size)
    checks.check_shards(model)
    names = checks.output_names(model, config, size)
    target.check(request.overwrite)
    side = target.side_files(root, request.overwrite)
    plan = _plan(model, names, request, max_file_bytes)
    total = sum(nbytes(spec) for specs, _ in plan.values() for spec in specs.values())
    target.check_space(total)
    with target:
        _write(model, names, plan, target, total)
        target.copy_side_files(side, None if request.dtype == "keep" else str(TYPES[request.dtype])[6:])
        target.commit()
    place = f"{target.final}: {len(plan)} file{'s' * (len(plan) > 1)}, {in_words(total)}, checksums verified"
    note = "" if config or size > 1 else "; there is no config.json, which transformers needs to load it"
    return f"{model.shards[0].where.parent} (size {request.source_mp_size}) -> {place}{note}"


def _model_type(request: Request, config: dict | None) -> str:
    said = (config or {}).get("model_type")
    if request.model_type and said and request.model_type != said:
        raise UserError(f"--model_type {request.model_type}, but {request.input_path}/config.json says {said}")
    chosen = request.model_type or said
    if not isinstance(chosen, str | None):
        raise UserError(f"{request.input_path}/config.json: model_type is {chosen!r}, not a text")
    if chosen is None:
        raise UserError(f"{request.input_path} has no config.json: give --model_type")
    if chosen not in FAMILIES:
        raise UserError(f"model type {chosen} cannot be resharded; there are {', '.join(FAMILIES)}")
    return chosen


def _plan(
    model: SourceModel, names: dict[str, str], request: Request, limit: int
) -> dict[str, tuple[dict[str, Spec], int]]:
    """The output's files: by name, each tensor's dtype and shape, and the rank whose part of the model it is."""
    size, (single, shard) = request.target_mp_size, FORMATS[request.format]
    specs = {}
    for name, origin in names.items():
        kept = model.dtypes[origin]
        dtype = TYPES.get(request.dtype, kept) if kept.is_floating_point else kept
        specs[name] = dtype, model.shape(origin, size)
    if size > 1:
        return {shard.format(rank): (specs, rank) for rank in range(size)}
    groups: list[dict[str, Spec]] = [{}]
    room = limit
    for name, spec in specs.items():
        if nbytes(spec) > room and groups[-1]:
            groups.append({})
            room = limit
        groups[-1][name] = spec
        room -= nbytes(spec)
    stem, dot, ending = single.rpartition(".")
    several = [f"{stem}-{at:05d}-of-{len(groups):05d}{dot}{ending}" for at in range(1, len(groups) + 1)]
    return {name: (group, 0) for name, group in zip(several if len(groups) > 1 else [single], groups)}


def _write(model: SourceModel, names: dict[str, str], plan: dict, target: Target, total: int) -> None:
    """Each tensor of the source is read once and goes into all files that take a part of it; then all is verified."""
    writers: list[tuple[TensorWriter, int]] = []
    try:
        for name, (specs, rank) in plan.items():
            about = {"format": "pt"} | ({} if target.size == 1 else {"mp_rank": str(rank), "mp_size": str(target.size)})
            writers.append((open_writer(target.folder / name, specs, about), rank))
        with _bar("writing", total) as bar:
            for name, origin in names.items():
                for writer, rank in writers:
                    if name in writer.specs:
                        for part in model.parts(origin, target.size, rank):
                            part = _cast(part, writer.specs[name][0], name)
                            writer.write(name, part)
                            bar.update(part.nbytes)
                        part = None  # the last reference into the source's mapping, which then can go
                model.release()
        for writer, _ in writers:
            writer.finish()
    finally:
        for writer, _ in writers:
            writer.close()
    with _bar("verifying", total) as bar:
        for writer, _ in writers:
            writer.verify(bar.update)
    if target.size == 1 and len(plan) > 1:
        _write_index(target, plan, total)


def _write_index(target: Target, plan: dict, total: int) -> None:
    places = {tensor: file for file, (specs, _) in plan.items() for tensor in specs}
    content = {"metadata": {"total_size": total}, "weight_map": places}
    index = target.folder / f"{FORMATS[target.kind][0]}.index.json"
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cast(part: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """In another type; UserError if it has no number of that size."""
    if part.dtype == dtype:
        return part
    result = part.to(dtype)
    if not torch.equal(result.isinf(), part.isinf()):
        raise UserError(f"{name} holds numbers too large for {str(dtype)[6:]}: use --dtype bf16, fp32 or keep")
    return result


def _bar(what: str, total: int) -> tqdm:
    """A bar on a terminal, nothing in a log file."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)
