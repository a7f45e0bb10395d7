"""Clusters on one machine: two "nodes" that meet as real ones do, ranks that die, other numbers of ranks, Slurm."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.runs import Run, assert_same_run
from helpers.training import ROOT, free_port, golden_argv, metrics_of

from promptkd.distributed import rendezvous
from promptkd.distributed.rendezvous import fresh_prefix_store

pytestmark = pytest.mark.distributed

FP32, ZERO3 = (str(ROOT / f"configs/deepspeed/ds_config_{name}.json") for name in ("fp32", "zero3_fp32"))
SCRIPT = "scripts/gpt2/promptkd/promptkd_base.sh"
LOSSES, NORMS = ("student_loss", "prompt_kd_loss", "prompt_base_loss"), ("grad_norm", "prompt_grad_norm")
OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what training in this process leaves
EXAMPLES = 8  # of a step, whatever the number of ranks
LONG, OFTEN = 12, ("--checkpoint-every", "1")  # steps of a run that something happens to
STARTED: list[subprocess.Popen] = []


def argv(save: Path, ranks: int, *extra: str, steps: int = 3, config: str = FP32) -> list[str]:
    options = ["--total-iters", str(steps), "--deepspeed_config", config, "--keep-checkpoints", "9"]
    options += ["--batch-size", str(EXAMPLES // ranks), "--gradient-accumulation-steps", "1"]
    options += ["--teacher-lr", "0.001", "--warmup-iters", "0"]  # the script has others
    return golden_argv("promptkd", save, *options, *extra)


def bash(script: str, *arguments: str, log: Path, **environment: str) -> subprocess.Popen:
    """A script of the project in the background; all it prints goes to `log`."""
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    settings = {"OMP_NUM_THREADS": "1", "PROMPTKD_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
    with open(log, "a") as output:
        job = subprocess.Popen(
            ["bash", script, *arguments], cwd=ROOT, stdout=output, stderr=output,
            env={**inherited, **settings, **environment}, start_new_session=True,
        )  # fmt: skip
    STARTED.append(job)
    return job


@pytest.fixture(scope="module", autouse=True)
def no_leftovers():
    """Whatever a failed test left running is told to end; torchrun takes its ranks along."""
    yield
    for job in STARTED:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)


def finish(run: Run) -> None:
    assert set(run.wait()) == {0}, run.log.read_text()


def assert_close(save: Path, other: Path) -> None:
    rows, others = metrics_of(save), metrics_of(other)
    assert len(rows) == len(others) > 0
    for row, theirs in zip(rows, others):
        assert [row[name] for name in LOSSES] == pytest.approx([theirs[name] for name in LOSSES], abs=1e-6)
        assert [row[name] for name in NORMS] == pytest.approx([theirs[name] for name in NORMS], rel=1e-4)
        assert row["response_tokens"] == theirs["response_tokens"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one rank that the others are compared with."""
    folder = tmp_path_factory.mktemp("alone")
    finish(Run(argv(folder / "run", 1), folder / "log"))
    return folder / "run"


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory) -> Path:
    """Two machines of two ranks each, in truth one: the script on both, as its head says, one behind the other."""
    folder = tmp_path_factory.mktemp("two_nodes")
    meet = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    options = argv(folder / "run", 4)[2:]
    nodes = [bash(SCRIPT, ".", "0", "2", *options, log=folder / "log", **meet, NODE_RANK=str(n)) for n in (1, 0)]
    assert [node.wait(150) for node in nodes] == [0, 0], (folder / "log").read_text()
    return folder / "run"


@pytest.mark.slow
def test_two_nodes_compute_what_one_rank_does(two_nodes, alone):
    assert_close(two_nodes, alone)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_from_two_nodes(two_nodes, tmp_path):
    """The last checkpoint of the four ranks; two go on for another two steps, as one rank from the start does."""
    resume = ["--resume", "--resume-anyway"]  # --total-iters is another
    finish(Run(argv(two_nodes, 2, *resume, steps=5), tmp_path / "log", ranks=2))
    assert [row["step"] for row in metrics_of(two_nodes)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "config, extra, ranks",
    [pytest.param(ZERO3, [], 4, marks=pytest.mark.slow), (FP32, ["--teacher-deepspeed-config", ZERO3], 2)],
)
def test_a_sharded_teacher_teaches_the_same(alone, tmp_path, config, extra, ranks):
    """ZeRO-3: each rank holds its share of teacher and student, or of the teacher alone."""
    finish(Run(argv(tmp_path / "run", ranks, *extra, config=config), tmp_path / "log", ranks=ranks))
    assert_close(tmp_path / "run", alone)


def rank_process(parent: int, rank: int) -> int | None:
    """The process below `parent` that is this rank."""
    family = {parent}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if above in family:
                family.add(int(folder.name))
                if f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    return int(folder.name)
        except (OSError, ValueError):
            continue  # it has just ended
    return None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[int], Path]:
    """Makes the run that a restarted one of as many ranks is to end like, once."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def make(ranks: int) -> Path:
        if not (folder / str(ranks)).exists():
            finish(Run(argv(folder / str(ranks), ranks, *OFTEN, steps=LONG), folder / "log", ranks=ranks))
        return folder / str(ranks)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_rank_that_dies_is_started_again(nodes, undisturbed, tmp_path):
    """MAX_RESTARTS: the ranks start anew, go on from the last checkpoint and end as if nothing had happened."""
    log, meet = tmp_path / "log", {"MAX_RESTARTS": "1"}
    if nodes > 1:
        meet |= {"NNODES": str(nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    options = argv(tmp_path / "died", 2 * nodes, *OFTEN, steps=LONG)[2:]
    jobs = [bash(SCRIPT, ".", "0", "2", *options, log=log, **meet, NODE_RANK=str(n)) for n in range(nodes)]
    metrics, end = tmp_path / "died" / "metrics.jsonl", time.monotonic() + 90
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < end and {job.poll() for job in jobs} == {None}, log.read_text()
        time.sleep(0.01)
    ranks = [rank for job in jobs if (rank := rank_process(job.pid, 2 * nodes - 1)) is not None]
    os.kill(*ranks, signal.SIGKILL)
    assert [job.wait(150) for job in jobs] == [0] * nodes and "resumes after step" in log.read_text(), log.read_text()
    assert_same_run(tmp_path / "died", undisturbed(2 * nodes))


@pytest.fixture
def kept_store() -> dist.Store:
    """A store as torchrun keeps it: ranks 1 and 2 of an earlier start have asked, all three left their addresses."""
    store = dist.HashStore()
    for rank in (1, 2):
        store.set(f"promptkd/asks/{rank}", "dead")
    store.set("promptkd/answer/dead", "old")
    for rank in range(3):
        store.set(f"address/{rank}", "nobody's")
    return store


def test_a_start_sees_nothing_of_an_earlier_one(kept_store):
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda rank: fresh_prefix_store(kept_store, rank, 3), range(3)))
    for rank, part in enumerate(parts):
        assert not part.check([f"address/{rank}"])
        part.set(f"address/{rank}", str(rank))
    assert [part.get("address/2") for part in parts] == [b"2"] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_does_not_wait_for_ever_for_others(rank, kept_store, monkeypatch):
    soon = timedelta(seconds=0.2)
    monkeypatch.setattr(rendezvous, "RENDEZVOUS_TIMEOUT", soon)
    kept_store.set_timeout(soon)
    with pytest.raises(dist.DistStoreError):
        fresh_prefix_store(kept_store, rank, 3)


# Starts two tasks, hands SIGUSR1 on to both, and ends with 1 when one of them fails.
SRUN = """shift
trap 'kill -USR1 "${tasks[@]}"' USR1
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do
    until wait "$task"; do kill -0 "$task" 2>/dev/null || exit 1; done
done
"""


def tool(folder: Path, name: str, text: str) -> None:
    """A stand-in for a command, found before the real one."""
    (folder / name).write_text("#!/usr/bin/env bash\n" + text)
    (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("warned", [True, False])
def test_a_slurm_job_is_queued_again_when_its_time_is_over(tmp_path, warned):
    """Against stand-ins for Slurm's commands: srun starts two tasks and hands signals on, each task is a rank."""
    tool(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo first; else echo "$@" >>"$HERE/requeued"; fi')
    tool(tmp_path, "srun", SRUN)
    ends = "while :; do sleep 0.05; done" if warned else "exit 3"
    seen = '"$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $*"'
    tool(tmp_path, "python", f"trap 'exit 0' USR1\necho {seen} >\"$HERE/rank$RANK\"\n{ends}")
    slurm = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "first", "SLURM_NTASKS_PER_NODE": "2"}
    slurm |= {
        "HERE": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PROMPTKD_PYTHON": f"{tmp_path}/python",
    }
    job = bash("scripts/slurm.sh", SCRIPT, ".", "--lr", "0.1", log=tmp_path / "log", **slurm)
    ranks = [tmp_path / "rank0", tmp_path / "rank1"]
    while not all(rank.exists() and rank.read_text() for rank in ranks):
        assert job.poll() in (None, 1), (tmp_path / "log").read_text()
        time.sleep(0.02)
    if warned:
        os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(20) == (0 if warned else 1)
    assert (tmp_path / "requeued").exists() == warned
    for rank, file in enumerate(ranks):
        text = file.read_text().split()
        assert text[:3] == [f"{rank}/2", str(rank), "first:20007"] and text[3] == str(ROOT / "train.py")
        assert (
            text[text.index("--resume") + 1] == "auto" and text[text.index("--lr", text.index("--lr") + 1) + 1] == "0.1"
        )
        # 2 ranks instead of 8: four times the published accumulation of 16, after the script's own.
        assert text[len(text) - text[::-1].index("--gradient-accumulation-steps")] == "64"


def test_hostfiles_are_as_deepspeed_reads_them():
    from deepspeed.launcher.runner import fetch_hostfile

    sizes = {path.name: fetch_hostfile(str(path)) for path in (ROOT / "configs/hostfiles").iterdir()}
    assert sizes["single_node"] == {"localhost": 8} and list(sizes["two_nodes"].values()) == [8, 8]
