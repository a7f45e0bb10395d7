"""Tiny random models, prompts and decoding calls."""

from __future__ import annotations

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from promptkd.generation.decode import GenerationOutput, GenerationRequest, decode
from promptkd.generation.sampling import Sampling

EOS = 3


def tiny(family: str):
    torch.manual_seed(1)
    common = dict(vocab_size=40, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=EOS)
    if family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=64, initializer_range=0.5, **common)
        )
    elif family == "opt":
        sizes = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, ffn_dim=32, word_embed_proj_dim=16)
        model = OPTForCausalLM(OPTConfig(max_position_embeddings=64, init_std=0.5, **sizes, **common))
    else:
        sizes = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16)
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=32, initializer_range=0.5, **sizes, **common))
    return model.eval()


def prompts(count: int = 9):
    rng = np.random.default_rng(0)
    return [rng.integers(4, 40, size=rng.integers(1, 12)) for _ in range(count)]


def run(model, given, token_budget: int = 10_000, **changes) -> GenerationOutput:
    """Decode greedily, up to 20 tokens, unless the request's fields in `changes` say otherwise."""
    options = dict(max_new_tokens=20, end_ids=[EOS], sampling=Sampling(do_sample=False))
    return decode(model, GenerationRequest(given, **{**options, **changes}), token_budget)
