"""A project whose train.py and evaluate.py write in no time what a study reads."""

from __future__ import annotations

from pathlib import Path

TRAIN = """
import json, math, os, signal, sys, time
from pathlib import Path
words = [word.removeprefix("--") for word in sys.argv[1:]]
options = dict(word.partition("=")[::2] for word in words if "=" in word)
folder, rate, seed = Path(sys.argv[2]), float(options["lr"]), int(options["seed"])
(folder / "last").mkdir(parents=True, exist_ok=True)
(folder / "best_rougeL").mkdir(exist_ok=True)
best = {"sft": 0.008, "promptkd": 0.002}[options["method"]]  # the rate with the best dev score
score = 50 - 5 * abs(math.log2(rate / best)) - (3 if options.get("teacher-lr") == "0.0" else 0)
rows = [{"event": "eval", "step": step, "rougeL": score - 9 * (step == 2)} for step in (0, 2, 4)]
rows += [{"event": "exposure_bias", "step": step, "ex_acc_err": step + 10.0 * (options["method"] == "sft"),
          "mean_R": 1.0, "mean_eps": 1.0} for step in (0, 4)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "config.json").write_text(json.dumps({"parameters": {"prompt": 7, "teacher": 700}}))
(folder / "score.json").write_text(json.dumps(score + seed))
with open("calls.txt", "a") as calls:
    calls.write(f"{folder}\\n")
if Path("stop").exists() and Path("stop").read_text() in str(folder):
    def save(*_):
        time.sleep(0.5)
        Path("saved").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    Path("stopped").touch()
    time.sleep(60)
"""
EVALUATE = """
import json, sys
from pathlib import Path
model, save = Path(sys.argv[2]), Path(sys.argv[4])
score = json.loads((model.parent / "score.json").read_text())
save.mkdir(exist_ok=True)
rows = [[score + i for i in range(-2, 3)], [score + 2 * i for i in range(-2, 3)]]
entry = {"rougeL": {"mean": score}, "exact_match": {"mean": score / 2}, "mean_length": {"mean": 4.0},
         "rougeL_rows": rows, "metrics": {"rougeL": {"value": score}, "ece": {"value": score / 10}}}
(save / "results.json").write_text(json.dumps({"sets": {"near": entry, "far": entry}}))
"""
STUDY = """
title: A study
reference: PromptKD
updates: 4
evaluations: 2
rates: [0.001, 0.002, 0.004]
rate_seed: 0
prepare:
  - {name: data, run: "evaluate.py --model-path {save}/start --save {save}/data", product: "{save}/data/results.json"}
train: {batch_size: 2}
evaluate: {seeds: [1, 2], teacher_model_path: "{save}/data"}
evaluate_also: {greedy: {seeds: [1]}}
pairs: {small: {model_path: s}}
methods:
  SFT: {options: {method: sft}}
  PromptKD: {options: {method: promptkd}, tune: {temperature: [0.5]}}
  frozen: {like: PromptKD, options: {teacher_lr: 0.0}}
experiments:
  updates: {methods: all, seeds: [1, 2]}
  ablations: {methods: [frozen, PromptKD], seeds: [1, 3]}
  exposure: {methods: all, seeds: [1], evaluate: false, options: {exposure_bias_every: 2}}
"""


def write_project(folder: Path) -> Path:
    """Write the scripts and the study to a folder, and return the study's file."""
    (folder / "train.py").write_text(TRAIN)
    (folder / "evaluate.py").write_text(EVALUATE)
    (folder / "out").mkdir()
    (folder / "out" / "score.json").write_text("1.0")
    study = folder / "study.yaml"
    study.write_text(STUDY)
    return study
