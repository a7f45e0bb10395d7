"""The least time a PromptKD step could take on this machine: its floating-point work at the measured rates.

    OMP_NUM_THREADS=2 python benchmarks/least_work.py STUDENT TEACHER --prompt-tokens 2300 --response-tokens 1700 \\
        --decoding-steps 200 [--precision bf16]

Counts what no exact implementation with these parts can leave out: each matrix product once, at the rate this
machine reaches for its shape; one pass over the vocabulary for each softmax; one read of the student's weights
for each decoding step, where that takes longer than its products. Embeddings, attention, norms and the
optimizer's own arithmetic are left out, so it is a bound and not a goal that can be reached. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import AutoConfig

from promptkd.utils.memory import keep_freed_memory


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--prompt-tokens", type=int, required=True, help="of the window")
    parser.add_argument("--response-tokens", type=int, required=True, help="of the window")
    parser.add_argument("--decoding-steps", type=int, required=True, help="the longest response of the window")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    return parser.parse_args()


def seconds(work) -> float:
    """The quickest of several runs."""
    work()
    times = []
    for _ in range(7):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


class Machine:
    """Rates: products [flop/s], by shape; reading weights [bytes/s]; a softmax pass [s per token]."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.known = dtype, {}

    def product(self, rows: int, inner: int, columns: int) -> float:
        key = rows, inner, columns
        if key not in self.known:
            a, b = torch.randn(rows, inner).to(self.dtype), torch.randn(inner, columns).to(self.dtype)
            self.known[key] = 2 * rows * inner * columns / seconds(lambda: a @ b)
        return self.known[key]

    def reading(self) -> float:
        matrix, vector = torch.randn(8192, 8192).to(self.dtype), torch.randn(8192).to(self.dtype)
        return matrix.numel() * matrix.itemsize / seconds(lambda: matrix @ vector)

    def softmax(self, vocabulary: int) -> float:
        logits = torch.randn(16, vocabulary)
        return seconds(lambda: logits.log_softmax(-1)) / 16


def main() -> None:
    o = options()
    keep_freed_memory()
    dtype = torch.bfloat16 if o.precision == "bf16" else torch.float32
    machine, size = Machine(dtype), torch.finfo(dtype).bits // 8
    configs = [AutoConfig.from_pretrained(path) for path in (o.student, o.teacher)]
    (ds, bs), (dt, bt) = [(c.hidden_size, 12 * c.num_hidden_layers * c.hidden_size**2) for c in configs]
    vocabulary, n = configs[0].vocab_size, o.response_tokens
    positions = o.prompt_tokens + n
    body = {d: machine.product(2048, d, 4 * d) for d in (ds, dt)}
    head = {d: machine.product(128, d, vocabulary) for d in (ds, dt)}
    one_pass = machine.softmax(vocabulary)

    rows = max(n // o.decoding_steps, 1)
    step_products = rows * (2 * bs / body[ds] + 2 * vocabulary * ds / machine.product(rows, ds, vocabulary))
    step_reading = (bs + vocabulary * ds) * size / machine.reading()
    rollout = 2 * bs * o.prompt_tokens / body[ds] + o.decoding_steps * max(step_products, step_reading) + n * one_pass
    # teacher without prompt; with it, forward and backward to its input; logits of three models, one gradient
    prompt = 6 * bt * positions / body[dt] + 6 * vocabulary * dt * n / head[dt] + 2 * vocabulary * ds * n / head[ds]
    # teacher with the new prompt; student forward and backward; two logits, two gradients
    student = 2 * bt * positions / body[dt] + 6 * bs * positions / body[ds]
    student += 2 * vocabulary * dt * n / head[dt] + 6 * vocabulary * ds * n / head[ds]
    phases = {"rollout": rollout, "prompt": prompt + 3 * n * one_pass, "student": student + 2 * n * one_pass}
    total = sum(phases.values())
    rates = {"body": {d: round(r / 1e9) for d, r in body.items()}, "head": {d: round(r / 1e9) for d, r in head.items()}}
    told = {"seconds": total, "ms_per_response_token": 1000 * total / n, "phases": phases, "gflop_per_second": rates}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
