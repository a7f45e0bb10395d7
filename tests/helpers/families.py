"""Tiny random models of families other than the paper's three."""

from __future__ import annotations

import json

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.training import GOLDEN

# Features of families: grouped queries, sliding windows, scaled embeddings, partial rotary embeddings.
FAMILIES = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": None},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "gpt_neox": {"rotary_pct": 0.5},
}  # fmt: skip


def build(family: str, width: int = 16, **changes):
    """Build a tiny random model with the golden vocabulary, in eval mode."""
    vocabulary = json.loads((GOLDEN / "models/gpt2_student/config.json").read_text())["vocab_size"]
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, head_dim=8, vocab_size=vocabulary, max_position_embeddings=256)
    ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config = AutoConfig.for_model(family, **{**sizes, **ends, **FAMILIES.get(family, {}), **changes})
    torch.manual_seed(width)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.0 if "embed" in name else 0.5)
    return model
