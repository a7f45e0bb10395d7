"""Load and check models; see a causal LM the way distillation needs it: states at response positions, then a head."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers.models import BPE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.utils import logging as transformers_logging

from promptkd.data.templates import end_of_turn_id, special_token_ids
from promptkd.errors import UserError, is_out_of_memory
from promptkd.models.adapters import base_of, is_adapter, merge
from promptkd.models.checks import check_family, check_number, check_numbers, check_unexpected
from promptkd.models.deferred import load_deferred
from promptkd.models.tensor_parallel import TensorParallelGroup, load_shard
from promptkd.models.validation import check_files, check_model_folder, hub_advice, looks_local
from promptkd.models.vocabulary import SharedVocabulary, shared_vocabulary
from promptkd.weights.families import FAMILIES

transformers_logging.disable_progress_bar()  # its bars for loading and saving are noise beside ours


def load_tokenizer(path: str):
    """The tokenizer beside a model. Raises UserError when there is none or it has no end-of-text token."""
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = base_of(path, "the tokenizer of")
    if os.path.isdir(path):
        check_files(Path(path), "name a folder with a tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds here
        remedy = f"name a model's folder{hub_advice(path)}"
        raise UserError(f"{path}: no tokenizer can be loaded from it ({error}): {remedy}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no end-of-text token: set eos_token in tokenizer_config.json")
    _keep_unknown(tokenizer)
    return tokenizer


def _keep_unknown(tokenizer) -> None:
    """Have a SentencePiece model without byte pieces give the unknown token, as SentencePiece does.

    transformers converts it as one with byte pieces, which drops every character that the model does not know.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if isinstance(model, BPE) and model.byte_fallback and model.unk_token is None and tokenizer.unk_token:
        model.unk_token = None if "<0x00>" in tokenizer.get_vocab() else tokenizer.unk_token


def end_ids(tokenizer, *models: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a response: end-of-text first, the chat template's end of a turn, generation_config's.

    A configuration that was made without regard to the tokenizer (a family's defaults) names ordinary words: passed by.
    """
    named = [model.generation_config.eos_token_id for model in models]
    flat = [token for each in named for token in (each if isinstance(each, list) else [each])]
    known = special_token_ids(tokenizer)
    ends = [tokenizer.eos_token_id, end_of_turn_id(tokenizer), *(token for token in flat if token in known)]
    return tuple(dict.fromkeys(ends))


def load_causal_lm(
    path: str,
    dtype: torch.dtype,
    option: str,
    model_type: str | None = None,
    group: TensorParallelGroup | None = None,
    packed: Mapping[str, Any] = MappingProxyType({}),
    lazily: bool = False,
) -> PreTrainedModel:
    """A stock transformers causal LM in `dtype`, eval mode, on the CPU. `option` names it in errors.

    group: the ranks that hold it together; then this rank's part of it. packed: `quantization.loading_options`, with
    which it is on the device that they name. lazily: leave the layers' weights unread until an engine of ZeRO-3 shares
    them out (lazy_weights.py), if the family's layout is known; another is read whole.
    """
    config = load_config(path, option)
    if model_type is not None and config.model_type != model_type:
        raise UserError(f"{option} {path} is a {config.model_type} model, not {model_type}: correct --model-type")
    base = base_of(path, option)
    if base != path and (group is not None or packed):
        given = "a model cut by --model-parallel-size" if group is not None else "--teacher-quantization"
        raise UserError(
            f"{option} {path} is a LoRA adapter, which does not go with {given}: merge it into its base first"
        )
    if group is not None:
        model = load_shard(path, config, dtype, group, option)
        check_numbers(model, path, option)
        return fuse_activations(model).eval()
    if lazily and base == path and config.model_type in FAMILIES and os.path.isdir(path):
        model = load_deferred(path, config, dtype, option, lambda name, value: check_number(name, value, path, option))
    else:
        model = _load_whole(base, dtype, option, packed)
        model = model if base == path else merge(model, path, option)
        check_numbers(model, path, option)
    check_family(model, option)
    return fuse_activations(model).eval()


def _load_whole(path: str, dtype: torch.dtype, option: str, packed: Mapping[str, Any]) -> PreTrainedModel:
    """All weights of a model as transformers reads them. Raises UserError where they and config.json do not fit."""
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, trust_remote_code=False, **packed
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        misshapen = "ignore_mismatched_sizes" in str(error)
        reason = "tensors are misshapen, config.json is another model's: fetch it anew" if misshapen else error
        raise UserError(f"{option} {path}: the weights cannot be loaded: {reason}{hub_advice(path)}") from None
    if report["missing_keys"] or report.get("mismatched_keys"):
        wrong = sorted(map(str, report["missing_keys"] or report["mismatched_keys"]))
        raise UserError(
            f"{option} {path}: {len(wrong)} tensors are missing or misshapen, {wrong[0]} first: fetch it anew"
        )
    check_unexpected(model, report["unexpected_keys"], f"{option} {path}")
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing tables of what our own one-line errors name."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def fuse_activations(model: PreTrainedModel) -> PreTrainedModel:
    """Put torch's one-pass GELU where GPT-2 has its tanh form in eight passes: the same function, less memory."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def load_config(path: str, option: str):
    """The model's configuration; UserError when the folder is missing or config.json is broken."""
    if not path:
        raise UserError(f"{option} is missing: name a model's folder")
    path = base_of(path, option)
    if looks_local(path) and not os.path.isdir(path):
        raise UserError(f"{option} {path}: no such folder: name a folder with config.json and weights")
    if os.path.isdir(path):
        check_model_folder(Path(path), option)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        remedy = f"name a model's folder{hub_advice(path)}"
        raise UserError(f"{option} {path}: no readable config.json ({error}): {remedy}") from None


def count_parameters(path: str) -> int:
    """The parameters of the whole model in a folder, however it is shared out over ranks, without loading it."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(path, "the model")).num_parameters()


def check_pair(
    student: PreTrainedModel, teacher: PreTrainedModel, student_tokenizer, teacher_tokenizer
) -> SharedVocabulary | None:
    """The token ids that the two models share, None where all do. UserError where an id has two meanings."""
    sizes = tuple(model.get_output_embeddings().weight.shape[0] for model in (student, teacher))
    words = (tokenizer.get_vocab() for tokenizer in (student_tokenizer, teacher_tokenizer))
    return shared_vocabulary(sizes, teacher.get_input_embeddings().weight.shape[0], *words)


def load_own_tokenizer(path: str, config, option: str):
    """The tokenizer beside the model of this configuration; UserError when it has ids without an embedding."""
    tokenizer = load_tokenizer(path)
    rows, largest = (
        getattr(config.get_text_config(), "vocab_size", None),
        max(tokenizer.get_vocab().values(), default=0),
    )
    if rows is not None and largest >= rows:
        raise UserError(
            f"{option}: the tokenizer's ids go up to {largest}, the model has embeddings for {rows} tokens: resize it "
            "(resize_token_embeddings), or take the added tokens out of the tokenizer"
        )
    return tokenizer


def check_positions(config, tokens: int, option: str) -> None:
    """Raise UserError when `tokens` positions are more than a model's table has."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise UserError(
            f"{option}: {tokens} positions are needed (--max-length, and --prompt-len for a teacher), "
            f"the model has {limit}: lower --max-length"
        )
