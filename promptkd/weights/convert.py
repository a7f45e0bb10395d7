"""Convert a model from one tensor-parallel size to another: check, write, verify, then move into place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from promptkd.errors import UserError
from promptkd.utils.format import format_bytes
from promptkd.weights.checks import check_model, output_names
from promptkd.weights.families import FAMILIES
from promptkd.weights.output import Output, write_index
from promptkd.weights.reader import FORMATS, SourceModel, inside, read_json
from promptkd.weights.safetensors_io import TensorFile, have_same_bytes, widest_first, write_verified
from promptkd.weights.torch_files import read_tensors

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MAX_FILE_BYTES = 5 * 10**9  # larger models of size 1 are split into several files with an index

Layout = dict[str, Tensor]  # tensors on the meta device


@dataclass(frozen=True)
class ConversionRequest:
    """The options of a conversion."""

    input_path: Path
    source_mp_size: int
    target_mp_size: int
    model_type: str | None = None  # None: read it from config.json
    output_path: Path | None = None  # None: the input path
    format: str = "safetensors"  # a key of FORMATS
    dtype: str = "keep"  # "keep" or a key of DTYPES
    overwrite: bool = False


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'files'}: {error.strerror or error}") from None


@_one_line_errors()
def convert(request: ConversionRequest, max_file_bytes: int = MAX_FILE_BYTES) -> str:
    """Convert a model to another tensor-parallel size, dtype or file format, one tensor at a time.

    Args:
        request: The options.
        max_file_bytes: Maximum size of a file of a complete model.

    Returns:
        One line that says what was read and written.

    Raises:
        UserError: If the input is bad or the disk is full. The output path is then as it was.
    """
    root, size = request.input_path, request.target_mp_size
    if not root.is_dir():
        raise UserError(f"--input_path {root} is not a folder: correct the path")
    config = read_json(inside(root, "config.json")) if (root / "config.json").exists() else None
    family = FAMILIES[_model_type(request, config)]
    output = Output(request.output_path or root, size)
    if size == request.source_mp_size and output.root.resolve() == root.resolve():
        raise UserError(f"source and target are both of size {size}: give an --output_path to change only the format")
    model = SourceModel(root, request.source_mp_size, family)
    check_model(model, config, size)
    names = output_names(model, config, size)
    output.check(request.overwrite)
    side = output.side_files(root, request.overwrite)
    files = _plan_files(_layout(model, names, request), request, max_file_bytes)
    sizes = [sum(tensor.nbytes for tensor in layout.values()) for layout, _ in files.values()]
    output.check_space(sum(sizes) + (max(sizes) if request.format == "bin" else 0))
    with output:
        _write(model, names, files, output)
        output.copy_side_files(side, None if request.dtype == "keep" else str(DTYPES[request.dtype])[6:])
        output.commit()
    note = "" if config or size > 1 else "; there is no config.json, which transformers needs to load it"
    return (
        f"{model.shards[0].path.parent} (size {request.source_mp_size}) -> {output.final}: "
        f"{len(files)} file{'s' * (len(files) > 1)}, {format_bytes(sum(sizes))}, checksums verified{note}"
    )


def _model_type(request: ConversionRequest, config: Mapping[str, Any] | None) -> str:
    configured = (config or {}).get("model_type")
    if request.model_type and configured and request.model_type != configured:
        raise UserError(f"--model_type {request.model_type}, but {request.input_path}/config.json says {configured}")
    chosen = request.model_type or configured
    if not isinstance(chosen, str | None):
        raise UserError(
            f"{request.input_path}/config.json: model_type is {chosen!r}, not a string: use the model's own config.json"
        )
    if chosen is None:
        raise UserError(f"{request.input_path} has no config.json: give --model_type")
    if chosen not in FAMILIES:
        raise UserError(f"model type {chosen} cannot be resharded; supported are {', '.join(FAMILIES)}")
    return chosen


def _layout(model: SourceModel, names: Mapping[str, str], request: ConversionRequest) -> Layout:
    """Return the tensors of one output shard on the meta device, in the order of the file."""
    layout = {}
    for name, origin in names.items():
        dtype = model.layout[origin].dtype
        if dtype.is_floating_point:
            dtype = DTYPES.get(request.dtype, dtype)
        layout[name] = torch.empty(model.shape(origin, request.target_mp_size), dtype=dtype, device="meta")
    return widest_first(layout)


def _plan_files(layout: Layout, request: ConversionRequest, max_file_bytes: int) -> dict[str, tuple[Layout, int]]:
    """Return the output's files: name -> (its tensors, its tensor-parallel rank)."""
    single, shard = FORMATS[request.format]
    if request.target_mp_size > 1:
        return {shard.format(rank): (layout, rank) for rank in range(request.target_mp_size)}
    pattern = single.replace(".", "{suffix}.")
    split = split_torch_state_dict_into_shards(layout, filename_pattern=pattern, max_shard_size=max_file_bytes)
    return {file: ({name: layout[name] for name in names}, 0) for file, names in split.filename_to_tensors.items()}


def _write(
    model: SourceModel, names: Mapping[str, str], files: Mapping[str, tuple[Layout, int]], output: Output
) -> None:
    """Write all files, and an index if a complete model has several."""
    for file, (layout, rank) in files.items():
        metadata = {"format": "pt"}
        if output.size > 1:
            metadata |= {"mp_rank": str(rank), "mp_size": str(output.size)}
        path = (output.folder / file).with_suffix(".safetensors")
        tensors = (
            _cast(model.piece(names[name], output.size, rank), expected.dtype, name)
            for name, expected in tqdm(layout.items(), desc=file, unit="tensor", disable=None)  # no bar in a log file
        )
        write_verified(path, layout, tensors, metadata)
        if file.endswith(".bin"):
            _to_bin(path)
    if output.size == 1 and len(files) > 1:
        write_index(output.folder, {file: layout for file, (layout, _) in files.items()})


def _to_bin(path: Path) -> None:
    """Replace a safetensors file by a `.bin` file, which `torch.save` writes from the memory-mapped tensors."""
    tensors = TensorFile(path)
    target = path.with_suffix(".bin")
    try:
        torch.save(dict(tensors), target)
    except RuntimeError as error:  # torch's writer has no OSError for a full disk
        raise UserError(f"{target} cannot be written ({' '.join(str(error).split())[:120]}): make room") from None
    written = read_tensors(target)
    if list(written) != list(tensors) or not all(have_same_bytes(written[name], tensors[name]) for name in tensors):
        raise UserError(f"{target} reads back with other tensors than were written: check the disk")
    path.unlink()


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert to another dtype, and check that no number overflows."""
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if not torch.equal(result.isinf(), tensor.isinf()):
        raise UserError(f"{name} holds numbers too large for {str(dtype)[6:]}: use --dtype bf16, fp32 or keep")
    return result
