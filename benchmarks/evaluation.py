"""Seconds and memory of an evaluation: five seeds in one process here, against five published runs, emulated.

    python benchmarks/evaluation.py --model MODELS/gpt2-dolly-student --data DATA [--seeds 10 20]

One published run for each seed that is asked for with --published-seeds (their mean stands for the others), one of
ours with all seeds, each in its own process, with the complete process timed. Writes evaluation.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bars import draw_bars

from promptkd.utils.memory import KEEP
from promptkd.utils.tables import Table

ROOT = Path(__file__).parents[1]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="root of the test sets")
    parser.add_argument("--name", default="self_inst")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50])
    parser.add_argument("--published-seeds", type=int, nargs="+", default=[10])
    parser.add_argument("--rows", type=int, default=-1)
    parser.add_argument("--malloc", choices=["keep", "system"], default="keep", help="of both sides")
    parser.add_argument("--save", type=Path, default=ROOT / "results/benchmarks")
    return parser.parse_args()


def timed(command: list, malloc: str) -> tuple[float, str]:
    environment = {k: v for k, v in os.environ.items() if k not in KEEP}
    environment |= {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PROMPTKD_MALLOC": malloc}
    environment |= KEEP if malloc == "keep" else {}
    began = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command[1]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began, done.stdout


def ours(o: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as save:
        seconds, _ = timed(
            [sys.executable, ROOT / "evaluate.py", "--model-path", o.model, "--data-dir", o.data, "--data-names",
             o.name, "--seeds", *o.seeds, "--dev-num", o.rows, "--save", save, "--overwrite"],
            o.malloc,
        )  # fmt: skip
        results = json.loads((Path(save) / "results.json").read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "peak_gb": results["run"]["peak_memory_gb"],
        "rougeL": results["sets"][o.name]["rougeL"]["mean"],
    }


def published(o: argparse.Namespace, seed: int) -> dict:
    from promptkd.evaluation.test_sets import find_sets

    found, _ = find_sets(str(o.data), [o.name])
    command = [sys.executable, ROOT / "benchmarks/published_evaluation.py", o.model, found[o.name]]
    seconds, out = timed([*command, "--rows", o.rows, "--seed", seed], o.malloc)
    told = json.loads(out.strip().splitlines()[-1])
    return {"seconds": seconds, "peak_gb": told["peak_rss_gb"], "rougeL": told["rougeL"]}


def main() -> None:
    o = options()
    runs = [published(o, seed) for seed in o.published_seeds]
    mine = ours(o)
    each = sum(run["seconds"] for run in runs) / len(runs)
    theirs = each * len(o.seeds)
    kept = "freed memory kept" if o.malloc == "keep" else "the allocator as it comes"
    table = Table(["", "seconds", "peak GB", "ROUGE-L"])
    peak = max(run["peak_gb"] for run in runs)
    table.add(f"published, one seed ({len(runs)} measured)", f"{each:.1f}", f"{peak:.2f}", f"{runs[0]['rougeL']:.2f}")
    table.add("published, all seeds, one after another", f"{theirs:.1f}")
    table.add("ours, all seeds", f"{mine['seconds']:.1f}", f"{mine['peak_gb']:.2f}", f"{mine['rougeL']:.2f}")
    table.add("ratio", f"{theirs / mine['seconds']:.1f}")
    text = f"{o.name}, {len(o.seeds)} seeds, 2 threads, fp32, {kept}\n\n{table.markdown()}"
    o.save.mkdir(parents=True, exist_ok=True)
    (o.save / "evaluation.json").write_text(
        json.dumps({"published": runs, "ours": mine, "seeds": o.seeds}, indent=1), encoding="utf-8"
    )
    (o.save / "evaluation.md").write_text(text + "\n", encoding="utf-8")
    seconds = {"ours": [mine["seconds"]], "published flow (computed)": [theirs]}
    draw_bars(seconds, f"seconds for {o.name} with {len(o.seeds)} seeds", o.save / "evaluation.png")
    print(text)


if __name__ == "__main__":
    main()
