"""Time and memory of a PromptKD step against window, response length, vocabulary and model size, on random models.

    python benchmarks/scaling.py [--axes window response vocabulary width] [--save DIR]

Each point is a run of train.py in a process of its own (two threads, fp32, three steps, the last two count). Random
students hardly ever end a response, so its length is what it may be at most. The exponent is the slope of the
logarithms. Memory beyond the weights leaves out weights, gradients and AdamW's two moments of the student, and the
teacher's weights. Writes scaling.json, scaling.md and scaling.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from promptkd.utils.plotting import COLORS, new_figure
from promptkd.utils.tables import Cell, Table

ROOT = Path(__file__).parents[1]


BASE = {"window": 16, "response": 64, "vocabulary": 50257, "width": 192}
AXES = {
    "window": [4, 8, 16, 32],
    "response": [32, 64, 128, 256],
    "vocabulary": [25000, 50257, 100000, 150000],
    "width": [128, 192, 320, 512],
}
TICKS = [0.5, 1, 2, 5, 10, 20, 50]  # of the picture


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "tests/golden/models/gpt2_student")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--save", type=Path, default=ROOT / "results/benchmarks")
    return parser.parse_args()


def make_models(folder: Path, tokenizer: Path, vocabulary: int, shapes: dict[str, dict[str, int]]) -> dict[str, int]:
    """Random GPT-2s in folders of their names; returns how many parameters each has."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    counts = {}
    for name, shape in shapes.items():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=512, **shape))
        counts[name] = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / name)
    return counts


def train(folder: Path, window: int, response: int, precision: str, steps: int = 3) -> tuple[list[dict], float]:
    """Train the models in `folder` on made-up prompts; returns the rows of metrics.jsonl and the peak memory in GB."""
    rows = [json.dumps({"prompt": "word " * (20 + i % 10), "response": "x"}) for i in range(64)]
    (folder / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    command = [
        sys.executable, ROOT / "train.py", "--method", "promptkd", "--model-path", folder / "student",
        "--teacher-model-path", folder / "teacher", "--data-dir", folder, "--save", folder / "run",
        "--batch-size", window, "--total-iters", steps, "--dev-num", 0, "--keep-checkpoints", 0,
        "--max-prompt-length", 192, "--max-length", 192 + response,
        "--deepspeed_config", ROOT / f"configs/deepspeed/ds_config_{precision}.json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"train.py ended with {done.returncode}:\n{done.stderr[-2000:]}")
    peaks = json.loads((folder / "run/memory.json").read_text(encoding="utf-8"))["peak_memory_gb"]
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows, max(peaks)


def measure(o: argparse.Namespace, point: dict[str, int]) -> dict[str, float]:
    """Seconds of a step and peak memory in GB: all, and beyond the weights."""
    shape = {"n_embd": point["width"], "n_head": point["width"] // 64}
    shapes = {"student": {**shape, "n_layer": 4}, "teacher": {**shape, "n_layer": 8}}
    with tempfile.TemporaryDirectory() as place:
        counts = make_models(Path(place), o.tokenizer, point["vocabulary"], shapes)
        rows, peak = train(Path(place), point["window"], point["response"], o.precision)
    seconds = [row["step_seconds"] for row in rows][1:]
    weights = (16 * counts["student"] + 4 * counts["teacher"]) / 1e9
    return {
        "seconds": sum(seconds) / len(seconds),
        "peak_gb": peak,
        "beyond_gb": peak - weights,
        "tokens": rows[-1]["response_tokens"],
    }


def exponent(values: list[int], measured: list[float]) -> float:
    return float(np.polyfit(np.log(values), np.log(measured), 1)[0])


def make_table(results: dict[str, list[dict]]) -> Table:
    """Build the table of all points, and of the exponents of each axis."""
    table = Table(["axis", "value", "response tokens", "seconds", "peak GB", "beyond the weights"])
    for axis, points in results.items():
        for point in points:
            numbers = (f"{point[key]:.2f}" for key in ("seconds", "peak_gb", "beyond_gb"))
            table.add(axis, f"{point['value']:,}", f"{point['tokens']:,}", *numbers)
        values = [point["value"] for point in points]
        slopes = [exponent(values, [point[key] for point in points]) for key in ("seconds", "peak_gb", "beyond_gb")]
        table.add(Cell(f"{axis}, exponent", "em"), "", "", *(Cell(f"{slope:.2f}", "em") for slope in slopes))
    return table


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Draw seconds and peak memory over the values of each axis, on logarithmic scales."""
    with new_figure((3.4 * len(results), 3.2), columns=len(results)) as (figure, grid):
        for axes, (axis, points) in zip(grid[0], results.items()):
            values = [point["value"] for point in points]
            axes.loglog(values, [p["seconds"] for p in points], marker="o", label="seconds", color=COLORS[0])
            axes.loglog(values, [p["peak_gb"] for p in points], marker="s", label="peak GB", color=COLORS[4])
            axes.set(title=axis)
            axes.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
            axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
            axes.minorticks_off()
        drawn = [point[key] for points in results.values() for point in points for key in ("seconds", "peak_gb")]
        for axes in grid[0]:
            axes.set_ylim(min(drawn) / 1.3, max(drawn) * 1.3)
        for axes in grid[0, 1:]:
            axes.tick_params(labelleft=False)
        grid[0, 0].legend()
        figure.savefig(path)


def main() -> None:
    o = options()
    results: dict[str, list[dict]] = {}
    for axis in o.axes:
        for value in AXES[axis]:
            found = {"value": value, **measure(o, {**BASE, axis: value})}
            results.setdefault(axis, []).append(found)
            print(axis, found, flush=True)
    o.save.mkdir(parents=True, exist_ok=True)
    (o.save / "scaling.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (o.save / "scaling.md").write_text(make_table(results).markdown() + "\n", encoding="utf-8")
    draw(results, o.save / "scaling.png")
    print(make_table(results).markdown())


if __name__ == "__main__":
    main()
