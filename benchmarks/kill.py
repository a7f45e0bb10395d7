"""Kill a run of tiny models in each of its parts and resume it, many times; compare it with the undisturbed run.

PYTHONPATH=tests python benchmarks/kill.py --method promptkd --kills 25 --ranks 2

The kills are spread over the run and aimed at its parts in turn: each waits until a rank, drawn by lot, says that it
is in the part, and a random share of the time that the part takes. Prints one JSON object: kills by the part that
the rank was in when it died, whether metrics (times aside) and weights are equal. Exit status 1 when they are not.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from helpers.runs import PRELOAD, Run, assert_same_run, rows_of, student_with_dropout, tiny_argv
from marked_train import WIDTH, read_marks

from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.errors import UserError, exit_with

SCRIPT = "benchmarks.marked_train"
SAVING, READING = "saving a checkpoint", "reading a checkpoint"
AIMS = ("rollout", SAVING, "backward", READING, SAVING, "evaluation", "saving a model", "optimizer")


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
    extra += ["--eval-interval", "3", "--checkpoint-every", "2", "--resume", "auto", *how.extra.split()]
    if how.deepspeed_config:
        extra += ["--deepspeed_config", how.deepspeed_config]
    return tiny_argv(how.method, save, *extra)


def run_to_the_end(argv: list[str], save: Path, log: Path, ranks: int) -> None:
    marks_file(save, ranks)
    if set(Run(argv, log, ranks, SCRIPT).wait(1200)) != {0}:
        raise UserError(f"a run that nothing killed failed: {log.read_text('utf-8')[-2000:]}")


def marks_file(save: Path, ranks: int) -> Path:
    path = Path(f"{save}.parts")
    path.write_bytes(bytes(WIDTH * ranks))
    return path


@dataclass
class Aim:
    """Where a kill is to land: in `part` of `rank`, `wait` seconds after it was seen there, after `rows` rows."""

    part: str
    rank: int
    wait: float
    rows: range  # of metrics.jsonl; beyond its end the kill comes whatever the part


def kill_once(argv: list[str], save: Path, log: Path, ranks: int, aim: Aim) -> str:
    """Start or resume, kill all ranks; what the rank that was aimed at was doing."""
    said, marks = log.stat().st_size, marks_file(save, ranks)
    run = Run(argv, log, ranks, SCRIPT)

    def is_there() -> bool:
        return read_marks(marks)[aim.rank] == aim.part or (started and len(rows_of(save)) >= aim.rows.stop)

    started = aim.part != READING
    if started:
        run.wait_for(lambda: b"step" in log.read_bytes()[said:], 120)  # a resumed run has cut its metrics by then
        run.wait_for(lambda: len(rows_of(save)) >= aim.rows.start, 120)
    run.wait_for(is_there, 120, pause=0.0003)
    time.sleep(aim.wait)
    run.signal(signal.SIGKILL)
    ended = set(run.wait())
    if not ended <= {0, -9}:
        raise UserError(f"a rank ended with status {ended}: {log.read_text('utf-8')[-2000:]}")
    return "nothing, it had ended" if ended == {0} else read_marks(marks)[aim.rank]


def aims(how: KillSettings, seconds: dict[str, float], rows: int) -> list[Aim]:
    """Kills spread over the run's rows and, in turn, over the parts it has."""
    chance = random.Random(how.seed)
    seconds[READING] = seconds[SAVING] / 4  # the undisturbed run does none
    parts = [part for part in AIMS if part in seconds]  # not every method has rollouts
    made = []
    for kill in range(how.kills):
        part, start = parts[kill % len(parts)], rows * kill // how.kills
        wait = chance.random() * seconds[part]
        made.append(Aim(part, chance.randrange(how.ranks), wait, range(start, start + 8)))
    return made


def main() -> None:
    how = parse({"kill": KillSettings}, sys.argv[1:], prog="kill.py").kill
    PRELOAD.append(SCRIPT)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        student, log = student_with_dropout(folder / "student"), folder / "log"
        through, cut = folder / "through", folder / "cut"
        run_to_the_end(options(how, student, through), through, log, how.ranks)
        seconds = json.loads(Path(f"{through}.seconds").read_text(encoding="utf-8"))
        killed: Counter[str] = Counter()
        aimed = 0
        for aim in aims(how, seconds, len(rows_of(through))):
            part = kill_once(options(how, student, cut), cut, log, how.ranks, aim)
            killed[part] += 1
            aimed += part == aim.part
        run_to_the_end(options(how, student, cut), cut, log, how.ranks)
        try:
            assert_same_run(through, cut)
            equal = True
        except AssertionError as error:
            equal = f"no: {error}"
    print(json.dumps({**vars(how), "killed in": killed, "as aimed": aimed, "equal": equal}))
    sys.exit(0 if equal is True else 1)


if __name__ == "__main__":
    exit_with(main)
