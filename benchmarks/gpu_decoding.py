"""Tokens per second of decoding on a GPU: captured and eager, against `generate` and against the memory's bandwidth.

    python benchmarks/gpu_decoding.py --rows FILE [--models gpt2-base gpt2-xlarge] [--batch 32]

Every sequence has a prompt of 64 tokens and the same number of new ones. The bound reads all weights and the cache
once for each token, at the bandwidth of a device-to-device copy.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from gpu_common import DEVICE, Rows, bandwidth, random_model, seconds_of

from promptkd.generation.decode import GenerationRequest, decode
from promptkd.generation.sampling import Sampling

PROMPT = 64
SWITCH = "PROMPTKD_CUDA_GRAPHS"


def ours(model: Any, batch: int, new: int) -> None:
    """Sample with this project's decoder. No token ends a response."""
    keys = [(0, row) for row in range(batch)]
    prompts = [list(range(2, 2 + PROMPT))] * batch
    decode(model, GenerationRequest(prompts, new, [10**6], Sampling(), keys, keep_states=True), 10**9)


def generate(model: Any, batch: int, new: int) -> None:
    """Sample with `generate` of transformers."""
    ids = torch.arange(2, 2 + PROMPT, device=DEVICE).repeat(batch, 1)
    model.generation_config.eos_token_id = None
    options = dict(max_new_tokens=new, do_sample=True, top_k=0, pad_token_id=0)
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def bytes_per_token(model: Any, batch: int, new: int) -> float:
    """Return the bytes of weights and cache that one decoding step reads, at the mean length."""
    config = model.config
    cache = 2 * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize * batch * (PROMPT + new / 2)
    return sum(p.numel() * p.element_size() for p in model.parameters()) + cache


@torch.no_grad()
def measure(rows: Rows, name: str, model: Any, batch: int, new: int, speed: float) -> None:
    """Add the row of one model and batch. `speed` is the memory's bandwidth in bytes per second."""
    first, best = seconds_of(lambda: ours(model, batch, new))
    os.environ[SWITCH] = "off"
    eager_first, eager = seconds_of(lambda: ours(model, batch, new), 1)
    del os.environ[SWITCH]
    _, theirs = seconds_of(lambda: generate(model, batch, new), 1)
    seconds = {
        "first call": first,
        "eager": eager,
        "eager, first call": eager_first,
        "transformers generate": theirs,
        "bound": bytes_per_token(model, batch, new) / speed * new,
    }
    tokens = batch * new
    others = {side: tokens / value for side, value in seconds.items()}
    rows.add(f"decoding {name}, bf16, {batch} rows, {new} tokens", tokens / best, "tokens/s", **others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="file that the table's rows are appended to")
    parser.add_argument("--models", nargs="+", default=["gpt2-base", "gpt2-large", "gpt2-xlarge"])
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--layers", type=int, help="fewer layers, to try this script")
    args = parser.parse_args()
    rows, speed = Rows(args.rows), bandwidth()
    rows.add("device-to-device copy", speed / 1e9, "GB/s")
    for name in args.models:
        model = random_model(name, torch.bfloat16, args.layers)
        for batch in args.batch:
            measure(rows, name, model, batch, args.new, speed)
        del model
    if DEVICE == "cuda":
        free, total = torch.cuda.mem_get_info()
        rows.add("memory of the process outside of torch", (total - free - torch.cuda.memory_reserved()) / 1e9, "GB")


if __name__ == "__main__":
    main()
