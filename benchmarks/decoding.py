"""Check and measure captured decoding on a GPU: against the same steps run eagerly, and against `generate`.

    python benchmarks/decoding.py --precision bf16 --rows 32 --new 256

Models have random weights and no end token, so every response has `--new` tokens. In fp32, all three decoders have to
give the same greedy tokens; in half precision, rounding may change some. Exits with 1 if too many differ.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from promptkd.generation.captured import SWITCH
from promptkd.generation.decode import GenerationRequest, decode
from promptkd.generation.sampling import Sampling
from promptkd.models.loading import fuse_activations

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAMPLINGS = {
    "greedy": Sampling(do_sample=False),
    "sampled": Sampling(),
    "filtered": Sampling(top_k=50, top_p=0.9, temperature=0.8, no_repeat_ngram_size=3),
}


def make(name: str) -> PreTrainedModel:
    """Make a model of the size that a name stands for, with weights that give clear decisions."""
    torch.manual_seed(0)
    if name.startswith("gpt2"):
        sizes = {"gpt2": (12, 768, 12), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}[name]
        layers, width, heads = sizes
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, initializer_range=0.05)
        return fuse_activations(GPT2LMHeadModel(config))
    if name == "opt-125m":
        return OPTForCausalLM(OPTConfig(init_std=0.05))
    sizes = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=4, initializer_range=0.05, **sizes))


def timed(function: Callable[[], list[Tensor]], new: int) -> tuple[list[Tensor], str]:
    """Run twice. Return the responses, and the milliseconds for each of `new` tokens in the second run."""
    seconds = 0.0
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return result, f"{1000 * seconds / new:.3f}"


def differing(some: list[Tensor], others: list[Tensor]) -> float:
    """Return the share of responses that differ."""
    return sum(not torch.equal(a, b) for a, b in zip(some, others, strict=True)) / len(some)


def compare(model: PreTrainedModel, prompts: list[list[int]], new: int, kind: str) -> tuple[list[str], list[float]]:
    """Return the milliseconds a token of each decoder, and the shares of responses that differ from captured ones."""
    keys = [(3, row) for row in range(len(prompts))]
    request = GenerationRequest(prompts, new, [-1], SAMPLINGS[kind], keys)
    os.environ[SWITCH] = "on"
    captured, milliseconds = timed(lambda: decode(model, request, 10**9).responses, new)
    os.environ[SWITCH] = "off"
    eager, eager_milliseconds = timed(lambda: decode(model, request, 10**9).responses, new)
    times, shares = [milliseconds, eager_milliseconds], [differing(captured, eager)]
    if kind == "greedy":
        expected, milliseconds = timed(lambda: generate(model, prompts, new), new)
        times.append(milliseconds)
        shares.append(differing(captured, expected))
    return times, shares


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["gpt2", "opt-125m", "llama"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    args = parser.parse_args(argv)
    random, failed = torch.Generator().manual_seed(1), False
    lengths = torch.randint(40, 128, (args.rows,), generator=random).tolist()
    prompts = [torch.randint(10, 30_000, (length,), generator=random).tolist() for length in lengths]
    print("| model | precision | sampling | captured ms a token | eager | generate | differ: eager | generate |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    for name in args.models:
        model = make(name).eval()
        for precision in args.precision:
            model.to(device="cuda", dtype=PRECISIONS[precision])
            for kind in SAMPLINGS:
                times, shares = compare(model, prompts, args.new, kind)
                failed |= precision == "fp32" and max(shares) > 0.07
                cells = [*times, *[""] * (3 - len(times)), *(f"{share:.0%}" for share in shares)]
                print("| " + " | ".join([name, precision, kind, *cells, *[""] * (2 - len(shares))]) + " |", flush=True)
    return int(failed)


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: list[list[int]], new: int) -> list[Tensor]:
    """Decode greedily with transformers' `generate`, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device="cuda")
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device="cuda")
    options = dict(do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None)
    return list(model.generate(ids, attention_mask=mask, **options)[:, width:].cpu())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
