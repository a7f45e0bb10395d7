"""Load and check configurations, tokenizers and causal language models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from tokenizers.models import BPE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
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
from promptkd.models.wrapper import drop_layers
from promptkd.weights.families import FAMILIES

transformers_logging.disable_progress_bar()  # Only our own progress bars are shown.


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a model's folder or hub name.

    Raises:
        UserError: If there is no tokenizer, or it has no end-of-text token.
    """
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = base_of(path, "the tokenizer of")
    if os.path.isdir(path):
        check_files(Path(path), "name a folder with a tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here.
        remedy = f"name a model's folder{hub_advice(path)}"
        raise UserError(f"{path}: no tokenizer can be loaded from it ({error}): {remedy}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer has no end-of-text token: set eos_token in tokenizer_config.json")
    _keep_unknown(tokenizer)
    return tokenizer


def _keep_unknown(tokenizer: Any) -> None:
    """Make a SentencePiece model without byte pieces return the unknown token, as SentencePiece does.

    transformers converts it like a model with byte pieces. That drops every character outside of the vocabulary.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if isinstance(model, BPE) and model.byte_fallback and model.unk_token is None and tokenizer.unk_token:
        model.unk_token = None if "<0x00>" in tokenizer.get_vocab() else tokenizer.unk_token


def end_ids(tokenizer: Any, *models: PreTrainedModel) -> tuple[int, ...]:
    """List the tokens that end a response: end-of-text, end of turn, and those of each generation_config.

    A family's default generation_config may name ordinary words of the tokenizer. Only special tokens count.
    """
    configured = [cast(Any, model.generation_config).eos_token_id for model in models]
    flat = [token for each in configured for token in (each if isinstance(each, list) else [each])]
    special = special_token_ids(tokenizer)
    ends = [tokenizer.eos_token_id, end_of_turn_id(tokenizer), *(token for token in flat if token in special)]
    return tuple(dict.fromkeys(ends))


def load_causal_lm(
    path: str,
    dtype: torch.dtype,
    option: str,
    model_type: str | None = None,
    group: TensorParallelGroup | None = None,
    quantization: Mapping[str, Any] = MappingProxyType({}),
    deferred: bool = False,
) -> PreTrainedModel:
    """Load a causal language model of transformers on the CPU, in eval mode.

    Args:
        path: A folder with a model or a LoRA adapter, or a hub name.
        dtype: The precision of the weights.
        option: The option that gave the path, for error messages.
        model_type: The expected family. None accepts any.
        group: The ranks that hold the model together. This rank's part is loaded.
        quantization: Options of `models.quantization.loading_options`. They also choose the device.
        deferred: Whether an engine with ZeRO-3 reads the layers' weights later (`models.deferred`). Families that are
            not in the table of families are loaded at once.

    Raises:
        UserError: If the model is missing, damaged or not supported.
    """
    config = load_config(path, option)
    if model_type is not None and config.model_type != model_type:
        raise UserError(f"{option} {path} is a {config.model_type} model, not {model_type}: correct --model-type")
    base = base_of(path, option)
    if base != path and (group is not None or quantization):
        given = "a model cut by --model-parallel-size" if group is not None else "--teacher-quantization"
        raise UserError(
            f"{option} {path} is a LoRA adapter, which does not go with {given}: merge it into its base first"
        )
    if group is not None:
        model = load_shard(path, config, dtype, group, option)
        check_numbers(model, path, option)
        return fuse_activations(model).eval()
    if deferred and base == path and config.model_type in FAMILIES and os.path.isdir(path):
        model = load_deferred(path, config, dtype, option, lambda name, value: check_number(name, value, path, option))
    else:
        model = _load_complete(base, dtype, option, quantization)
        model = model if base == path else merge(model, path, option)
        check_numbers(model, path, option)
    check_family(model, option)
    return fuse_activations(model).eval()


def load_without_layers(path: str, dtype: torch.dtype, option: str) -> PreTrainedModel:
    """Load only embeddings and output head of a causal language model that `load_causal_lm` has loaded before.

    Args:
        path: A folder with a model or a LoRA adapter, or a hub name.
        dtype: The precision of the weights.
        option: The option that gave the path, for error messages.

    Raises:
        UserError: If the model is missing or damaged.
    """
    load_config(path, option)
    if is_adapter(path):  # It may change the head.
        return drop_layers(load_causal_lm(path, dtype, option))
    return _load_complete(path, dtype, option, {"num_hidden_layers": 0}, is_partial=True).eval()


def _load_complete(
    path: str, dtype: torch.dtype, option: str, changes: Mapping[str, Any], is_partial: bool = False
) -> PreTrainedModel:
    """Load a model with transformers. Raise UserError if its weights and config.json do not fit."""
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, trust_remote_code=False, **changes
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        misshapen = "ignore_mismatched_sizes" in str(error)
        reason = "tensors are misshapen for this config.json: download the model again" if misshapen else error
        raise UserError(f"{option} {path}: the weights cannot be loaded: {reason}{hub_advice(path)}") from None
    model, report = loaded
    if report["missing_keys"] or report.get("mismatched_keys"):
        wrong = sorted(map(str, report["missing_keys"] or report["mismatched_keys"]))
        raise UserError(
            f"{option} {path}: {len(wrong)} tensors are missing or misshapen, {wrong[0]} first: download the model "
            "again"
        )
    if not is_partial:
        check_unexpected(model, report["unexpected_keys"], f"{option} {path}")
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing tables about problems that are our own one-line errors."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def fuse_activations(model: PreTrainedModel) -> PreTrainedModel:
    """Replace GPT-2's tanh GELU of eight passes by torch's single pass: the same function with less memory."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def load_config(path: str, option: str) -> PretrainedConfig:
    """Load the configuration of a model or of an adapter's base model.

    Raises:
        UserError: If the folder is missing, or config.json is damaged.
    """
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
    """Count the parameters of a complete model without loading it."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(path, "the model")).num_parameters()


def check_pair(
    student: PreTrainedModel, teacher: PreTrainedModel, student_tokenizer: Any, teacher_tokenizer: Any
) -> SharedVocabulary | None:
    """Return the token ids that two models share (see `shared_vocabulary`), or None if they share all."""
    student_size, teacher_size = (_rows(model.get_output_embeddings()) for model in (student, teacher))
    vocabularies = (tokenizer.get_vocab() for tokenizer in (student_tokenizer, teacher_tokenizer))
    return shared_vocabulary((student_size, teacher_size), _rows(teacher.get_input_embeddings()), *vocabularies)


def _rows(embedding: nn.Module) -> int:
    return cast(torch.Tensor, embedding.weight).size(0)


def load_own_tokenizer(path: str, config: PretrainedConfig, option: str) -> Any:
    """Load the tokenizer of the model with this configuration.

    Raises:
        UserError: If the tokenizer has ids without an embedding, or cannot be loaded.
    """
    tokenizer = load_tokenizer(path)
    size = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if size is not None and largest >= size:
        raise UserError(
            f"{option}: the tokenizer's ids go up to {largest}, the model has embeddings for {size} tokens: resize it "
            "(resize_token_embeddings), or take the added tokens out of the tokenizer"
        )
    return tokenizer


def check_positions(config: PretrainedConfig, tokens: int, option: str) -> None:
    """Raise UserError if the model has fewer than `tokens` positions."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise UserError(
            f"{option}: {tokens} positions are needed (--max-length, and --prompt-len for a teacher), "
            f"the model has {limit}: lower --max-length"
        )
