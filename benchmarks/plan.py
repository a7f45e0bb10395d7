"""The plan's peak memory against what train.py's ranks reach on a CPU: random models, each setting in its own process.

    python benchmarks/plan.py [--settings gpt2-zero1 llama-zero3-2] [--save results/benchmarks]

Models are large enough to stand out from the imports' half a gigabyte; prompts and answers have the full length, which
is what the plan counts on. Two steps: the optimizer's states are there from the second on. Prints a table and writes
plan.json and plan.md to --save. A setting takes up to a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from promptkd.data.token_file import join_row, token_dtype, write_token_file
from promptkd.planning.memory import memory_of
from promptkd.utils.tables import Table

ROOT = Path(__file__).parents[1]

PROMPT, RESPONSE, TOKENIZER = 64, 64, ROOT / "tests/golden/models/gpt2_student"
NO_DROPOUT = {
    "gpt2": dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "opt": dict(dropout=0.0, attention_dropout=0.0),
    "llama": {},
}
NO_DROPOUT["tiny"] = NO_DROPOUT["gpt2"]
SIZES = {  # family -> (student, teacher)
    "gpt2": (
        dict(n_embd=512, n_layer=8, n_head=8, n_positions=256, vocab_size=32000),
        dict(n_embd=768, n_layer=12, n_head=12, n_positions=256, vocab_size=32000),
    ),
    "opt": (
        dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, ffn_dim=2048, word_embed_proj_dim=512),
        dict(hidden_size=1024, num_hidden_layers=10, num_attention_heads=16, ffn_dim=4096, word_embed_proj_dim=1024),
    ),
    "llama": (
        dict(
            hidden_size=640, num_hidden_layers=12, num_attention_heads=10, num_key_value_heads=2,
            intermediate_size=1728,
        ),
        dict(hidden_size=1024, num_hidden_layers=14, num_attention_heads=16, intermediate_size=2816),
    ),
    "tiny": (dict(n_embd=8, n_layer=1, n_head=1, n_positions=256, vocab_size=1500),) * 2,
}  # fmt: skip
ZERO = {
    "zero0": {},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "zero3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "bf16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
}
TENSOR = ["--model-parallel", "--model-parallel-size", "2"]
# name -> family, DeepSpeed file, ranks, examples of a step, options
SETTINGS = {
    "framework": ("tiny", "zero0", 1, 4, []),  # what memory.py's CPU_FRAMEWORK is taken from
    "gpt2-zero0": ("gpt2", "zero0", 1, 4, []),
    "gpt2-zero1": ("gpt2", "zero1", 1, 4, []),
    "gpt2-zero2": ("gpt2", "zero2", 1, 4, []),
    "gpt2-zero2-offload": ("gpt2", "offload", 1, 4, []),
    "gpt2-zero3": ("gpt2", "zero3", 1, 4, []),
    "gpt2-bf16": ("gpt2", "bf16", 1, 4, []),
    "gpt2-zero1-2": ("gpt2", "zero1", 2, 4, []),
    "gpt2-zero2-2": ("gpt2", "zero2", 2, 4, []),
    "gpt2-zero3-2": ("gpt2", "zero3", 2, 4, []),
    "opt-zero1": ("opt", "zero1", 1, 4, []),
    "opt-long": ("opt", "zero1", 1, 12, ["--token-budget", "2048"]),
    "opt-checkpointing": ("opt", "zero1", 1, 8, ["--gradient-checkpointing"]),
    "llama-zero1": ("llama", "zero1", 1, 4, []),
    "opt-tensor2": ("opt", "zero0", 2, 4, TENSOR),
    "llama-tensor2": ("llama", "zero1", 2, 4, TENSOR),
}


def make_models(family: str, folder: Path) -> None:
    """Student and teacher of random weights below `folder`, with the golden models' tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = "gpt2" if family == "tiny" else family
    vocabulary = {} if kind == "gpt2" else {"vocab_size": 16000, "max_position_embeddings": 256}
    ends = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), 0)
    for name, size in zip(("student", "teacher"), SIZES[family]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **size, **vocabulary, **NO_DROPOUT[family], **ends)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        for file in TOKENIZER.glob("*token*"):
            shutil.copy(file, folder / name)


def make_data(folder: Path) -> None:
    folder.mkdir()
    numbers, dtype = np.random.default_rng(0), token_dtype(1500)
    with write_token_file(folder / "train_0", dtype) as writer:
        for _ in range(64):
            writer.add(join_row(numbers.integers(1, 1400, PROMPT), numbers.integers(1, 1400, RESPONSE), dtype))


def options_of(name: str, work: Path) -> list[str]:
    family, zero, ranks, examples, extra = SETTINGS[name]
    shares = 1 if TENSOR[0] in extra else ranks  # of the examples: ranks that hold a model together have the same
    file = work / f"{zero}.json"
    file.write_text(json.dumps({**ZERO[zero], "zero_allow_untested_optimizer": True}), encoding="utf-8")
    return [
        "--method", "promptkd", "--model-path", str(work / family / "student"),
        "--teacher-model-path", str(work / family / "teacher"), "--data-dir", str(work / "data"),
        "--max-length", str(PROMPT + RESPONSE), "--max-prompt-length", str(PROMPT), "--dev-num", "0",
        "--batch-size", str(examples // shares), "--total-iters", "2", "--deepspeed_config", str(file), *extra,
    ]  # fmt: skip


def measured(name: str, work: Path) -> float:
    """Peak resident memory of the first rank, bytes."""
    ranks, save = SETTINGS[name][2], work / "run"
    launcher = [sys.executable]
    if ranks > 1:
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *meet]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    command = [*launcher, ROOT / "train.py", *options_of(name, work), "--save", save, "--overwrite"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return max(json.loads((save / "memory.json").read_text(encoding="utf-8"))["peak_memory_gb"]) * 1e9


def planned(name: str, work: Path) -> float:
    from promptkd.cli.plan import make

    ranks = SETTINGS[name][2]
    return memory_of(make(["--cpu", "--ranks", str(ranks), *options_of(name, work)])[0]).peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--save", type=Path, default=ROOT / "results/benchmarks")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_data(work / "data")
        for family in {SETTINGS[name][0]: None for name in args.settings}:
            make_models(family, work / family)
        for name in args.settings:
            plan, peak = planned(name, work), measured(name, work)
            rows.append({"setting": name, "planned": plan, "measured": peak, "difference": plan / peak - 1})
            print(
                f"{name:20} {plan / 1e9:.2f} GB planned, {peak / 1e9:.2f} measured, {plan / peak - 1:+.1%}", flush=True
            )
    table = Table(["setting", "planned GB", "measured GB", "difference"])
    for row in rows:
        planned_gb, measured_gb = (f"{row[key] / 1e9:.2f}" for key in ("planned", "measured"))
        table.add(row["setting"], planned_gb, measured_gb, f"{row['difference']:+.1%}")
    args.save.mkdir(parents=True, exist_ok=True)
    (args.save / "plan.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (args.save / "plan.md").write_text(table.markdown() + "\n", encoding="utf-8")
    print(table.markdown())


if __name__ == "__main__":
    main()
