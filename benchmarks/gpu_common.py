"""What the GPU benchmarks share: timing, random models, and the rows of the table that benchmarks/gpu.sh prints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from promptkd.config.options import DeviceSettings
from promptkd.distributed.device import choose_device

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "tests/golden/models/gpt2_student"
DEVICE = choose_device(0, DeviceSettings()).type  # with the settings of a run, such as no cuDNN attention


class Rows:
    """Rows of the table. Each is appended to a file after its measurement."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, what: str, ours: float, unit: str, **others: float) -> None:
        """Append a row: what was measured, this project's value, and the values of others by name."""
        row = {"what": what, "ours": ours, "unit": unit, "others": others}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(what, f"{ours:.4g} {unit}", {name: float(f"{value:.4g}") for name, value in others.items()}, flush=True)


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], times: int = 3) -> tuple[float, float]:
    """Return the seconds of the first call, and the fewest seconds of the calls after it."""
    measured = []
    for _ in range(1 + times):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        measured.append(time.perf_counter() - began)
    return measured[0], min(measured[1:])


def bandwidth() -> float:
    """Return the bytes per second that a device-to-device copy reads and writes."""
    size = 1 << (31 if DEVICE == "cuda" else 22)
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), 5)[1]


def random_model(name: str, dtype: torch.dtype, layers: int | None = None) -> Any:
    """Create a model of configs/models with random weights on the device, as train.py would load it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from promptkd.models.loading import fuse_activations

    config = AutoConfig.from_pretrained(ROOT / "configs/models" / name)
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return fuse_activations(model).eval()


def write_model(name: str, folder: Path, layers: int | None = None) -> None:
    """Write a random model in bf16 with the golden models' tokenizer, unless the folder exists."""
    from transformers import AutoTokenizer

    if folder.exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = random_model(name, torch.bfloat16, layers)
    ends = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    model.config.update(ends)
    model.generation_config.update(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prompt_texts(count: int) -> list[str]:
    """Return prompts of 41 - 161 tokens of the golden models' tokenizer, two for each word."""
    return ["word " * (20 + 7 * i % 61) for i in range(count)]
