"""The soft prompt P: trainable embeddings in front of the teacher's input (paper, section 3.1)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, TaskType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from promptkd.errors import UserError
from promptkd.models.adapters import lasting_path
from promptkd.utils.strict_json import read_object

_KEY = "prompt_embeddings"  # the name in PEFT's adapter_model.safetensors


class SoftPrompt(nn.Module):
    """P, `(prompt_len, hidden)`. It is float32 until an engine casts it."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(initial.detach().float().clone())

    def __len__(self) -> int:
        return self.embeddings.size(0)

    def forward(self, batch_size: int) -> Tensor:
        """Repeat P for each sequence of a batch, `(batch_size, prompt_len, hidden)`."""
        return self.embeddings.expand(batch_size, -1, -1)


def initial_prompt(init: str, prompt_len: int, embedding: nn.Embedding, tokenizer: Any, seed: int) -> Tensor:
    """Return the initial embeddings of P, `(prompt_len, hidden)`.

    Args:
        init: A text, "PAD" or "random". The tokens of a text are repeated or cut to `prompt_len`. They include special
            tokens, as in the published code. "PAD" is the padding token, which is end-of-text. "random" picks rows of
            the embedding table.
        prompt_len: Number of embeddings.
        embedding: The teacher's input embedding.
        tokenizer: The tokenizer of the models.
        seed: Seed of "random".

    Raises:
        UserError: If the text has no tokens, or a token without an embedding.
    """
    if init == "random":
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(embedding.num_embeddings, (prompt_len,), generator=generator).tolist()
    else:
        ids = [tokenizer.eos_token_id] if init == "PAD" else tokenizer(init)["input_ids"]
    if not ids:
        raise UserError(f"--prompt-init-text {init!r} has no tokens: give a text, PAD or random")
    if max(ids) >= embedding.num_embeddings:
        raise UserError(
            f"--prompt-init-text {init!r}: the teacher has embeddings for {embedding.num_embeddings} tokens, the text "
            f"has token {max(ids)}: give a text, or random"
        )
    ids = (list(ids) * math.ceil(prompt_len / len(ids)))[:prompt_len]
    with torch.no_grad():
        return embedding(torch.tensor(ids, device=embedding.weight.device)).float().cpu()


def save_prompt(embeddings: Tensor, folder: Path, teacher_path: str, config) -> None:
    """Write P in PEFT's file format, which `PeftModel.from_pretrained(teacher, folder)` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config.get_text_config()
    PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=embeddings.size(0),
        token_dim=embeddings.size(1),
        num_transformer_submodules=1,
        num_attention_heads=config.num_attention_heads,
        num_layers=config.num_hidden_layers,
        base_model_name_or_path=lasting_path(teacher_path),
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file({_KEY: embeddings.detach().float().cpu().contiguous()}, folder / "adapter_model.safetensors")


def load_prompt(folder: Path, width: int, prompt_len: int | None = None) -> Tensor:
    """Read P from a folder in PEFT's format.

    Args:
        folder: The folder.
        width: Hidden size of the teacher's embeddings.
        prompt_len: The expected number of embeddings. None accepts any.

    Returns:
        P, float32 `(prompt_len, hidden)`.

    Raises:
        UserError: If P is missing, is damaged or has another shape.
    """
    path, remedy = Path(folder) / "adapter_model.safetensors", "name a prompt/ folder of a run"
    config = read_object(Path(folder) / "adapter_config.json", f"no readable soft prompt: {remedy}")
    if (kind := config.get("peft_type")) != "PROMPT_TUNING":
        raise UserError(f"{folder}: it is an adapter of type {kind}, not a soft prompt: {remedy}")
    if not path.is_file():
        raise UserError(f"{path}: no such file: {remedy}")
    try:
        embeddings = load_file(path)[_KEY]
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: no readable soft prompt ({error}): {remedy}") from None
    if not embeddings.is_floating_point():
        raise UserError(f"{path}: the prompt has the type {embeddings.dtype} instead of floats: {remedy}")
    if embeddings.ndim != 2 or embeddings.size(1) != width:
        raise UserError(
            f"{path}: the prompt has shape {list(embeddings.shape)}, but the model's embeddings are {width} "
            "wide: use the prompt of this model"
        )
    if config.get("num_virtual_tokens") != len(embeddings):
        raise UserError(
            f"{folder}: adapter_config.json is of {config.get('num_virtual_tokens')} embeddings, but the weights have "
            f"the shape {list(embeddings.shape)}: {remedy}"
        )
    if prompt_len is not None and embeddings.size(0) != prompt_len:
        raise UserError(
            f"{path}: the prompt has {embeddings.size(0)} embeddings, --prompt-len is {prompt_len}: "
            f"give --prompt-len {embeddings.size(0)}"
        )
    if not torch.isfinite(embeddings).all():
        raise UserError(f"{path}: the prompt holds numbers that are not finite: use another one")
    return embeddings.float()
