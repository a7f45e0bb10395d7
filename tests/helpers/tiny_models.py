"""Tiny random models of each family in Hugging Face folders, and ways to read them other than the tool's own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from promptkd.weights.convert import ConversionRequest, convert

GROUPED = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
SHAPES = {
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4},
    "llama": GROUPED,
    "mistral": {**GROUPED, "head_dim": 16},
    "qwen2": GROUPED,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
}


def make_model(kind: str, folder: Path, **changes: object) -> torch.nn.Module:
    """A tiny random model, all of its tensors random, in a Hugging Face folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": 97 if kind == "gpt2" else 96, "num_hidden_layers": 2, **SHAPES[kind], **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model = model.to(torch.float16).eval()
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(1, 25).view(2, 12)).logits


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's tensors, read by another way than the tool's own."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    return torch.load(folder / "pytorch_model.bin", weights_only=True, mmap=True)


def shards(folder: Path, kind: str) -> list[dict[str, torch.Tensor]]:
    count = len(list(folder.iterdir()))
    if kind == "bin":
        names = [folder / f"pytorch_model_{rank}.bin" for rank in range(count)]
        return [torch.load(name, weights_only=True, mmap=True) for name in names]
    return [load_file(folder / f"model_{rank}.safetensors") for rank in range(count)]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def run(root: Path, source: int, target: int, **how: object) -> str:
    return convert(ConversionRequest(root, source, target, **how))
