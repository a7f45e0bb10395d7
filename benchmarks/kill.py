"""Kill a run of tiny models at random moments and resume it, many times; compare it with the undisturbed run.

python benchmarks/kill.py --method promptkd --kills 25 --ranks 2 --deepspeed-config FILE.json

Prints one JSON object: kills by what the run was doing, whether metrics (times aside) and weights are equal.
Exit status 1 when they are not.
"""

from __future__ import annotations

import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from runs import Run, assert_same_run, rows_of, student_with_dropout, tiny_argv

from promptkd.errors import UserError, exit_with
from promptkd.settings import at_least, option, parse


@dataclass
class KillSettings:
    method: str = option("promptkd", "method to run")
    kills: int = option(25, "how many times to kill it")
    ranks: int = option(1, "ranks of the run")
    steps: int = option(30, "optimizer steps of the run")
    seed: int = option(0, "seeds the moments")
    deepspeed_config: str | None = option(None, "DeepSpeed file")
    extra: str = option("", "further options of train.py, in one text")

    def __post_init__(self) -> None:
        at_least(1, kills=self.kills, ranks=self.ranks, steps=self.steps)


def options(how: KillSettings, student: Path, save: Path) -> list[str]:
    """Dropout and sampling on, evaluations, a checkpoint every second step: something to be killed in everywhere."""
    extra = ["--model-path", str(student), "--batch-size", "1", "--total-iters", str(how.steps), "--dev-num", "3"]
    extra += ["--eval-interval", "5", "--checkpoint-every", "2", "--resume", "auto", *how.extra.split()]
    if how.deepspeed_config:
        extra += ["--deepspeed_config", how.deepspeed_config]
    return tiny_argv(how.method, save, *extra)


def doing(save: Path) -> str:
    """What a run was doing when it was killed, as far as its folder tells."""
    if list(save.glob("checkpoints/.step-*.new")):
        return "saving a checkpoint"
    if list(save.glob(".*.new")):
        return "saving a model"
    lines = (save / "metrics.jsonl").read_text().splitlines() if (save / "metrics.jsonl").exists() else []
    return "a step or an evaluation" if lines else "before the first step"


def kill_once(argv: list[str], save: Path, log: Path, ranks: int, rows: int, wait: float) -> str | None:
    """Start or resume; kill all ranks `wait` seconds after the metrics have `rows` rows; None when it ended before."""
    said = log.stat().st_size
    run = Run(argv, log, ranks)
    run.wait_for(lambda: b"step" in log.read_bytes()[said:], 120)  # a resumed run has cut its metrics by then
    run.wait_for(lambda: len(rows_of(save)) >= rows, 120)
    time.sleep(wait)
    run.signal(signal.SIGKILL)
    ended = set(run.wait())
    if not ended <= {0, -9}:
        raise UserError(f"a rank ended with status {ended}: {log.read_text()[-2000:]}")
    return None if ended == {0} else doing(save)


def longest_pause(save: Path) -> float:
    """Seconds within which a run does everything at least once: two steps, an evaluation, saving."""
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    seconds = {kind: [row[f"{kind}_seconds"] for row in rows if f"{kind}_seconds" in row] for kind in ("step", "eval")}
    return 2 * statistics.median(seconds["step"]) + max(seconds["eval"], default=0.0) / 4 + 0.05


def main() -> None:
    how = parse({"kill": KillSettings}, sys.argv[1:], prog="kill.py").kill
    chance = random.Random(how.seed)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        student, log = student_with_dropout(folder / "student"), folder / "log"
        whole, cut = folder / "whole", folder / "cut"
        if set(Run(options(how, student, whole), log, how.ranks).wait(1200)) != {0}:
            raise UserError(f"the undisturbed run failed: {log.read_text()[-2000:]}")
        kills: Counter[str] = Counter()
        rows, pause = len(rows_of(whole)), longest_pause(whole)
        for kill in range(how.kills):
            wanted = rows * kill // how.kills  # spread over the run
            was = kill_once(options(how, student, cut), cut, log, how.ranks, wanted, chance.random() * pause)
            kills.update([was or "nothing, it had ended"])
        if set(Run(options(how, student, cut), log, how.ranks).wait(1200)) != {0}:
            raise UserError(f"the resumed run failed: {log.read_text()[-2000:]}")
        try:
            assert_same_run(whole, cut)
            equal = True
        except AssertionError as error:
            equal = f"no: {error}"
    print(json.dumps({**vars(how), "killed in": kills, "equal": equal}))
    sys.exit(0 if equal is True else 1)


if __name__ == "__main__":
    exit_with(main)
