"""Numbers that go wrong: the step is named and saved for study; an update is dropped where that is allowed."""

import json

import pytest
import torch
from helpers.deepspeed_files import zero_file
from helpers.poison import poison
from helpers.runs import crash, rows_of

from promptkd.errors import RunError


@pytest.mark.parametrize("stage, bf16", [(0, False), (1, True), (3, False)])
def test_a_loss_that_is_not_finite(stage, bf16, options, tmp_path):
    config = ["--deepspeed_config", zero_file(tmp_path, stage, bf16)]
    trainer = poison(2, options(tmp_path / "run", *config))
    indices = [example.index for example in trainer.local_batch(2).examples]
    with pytest.raises(RunError, match=r"promptkd, step 2: not finite: .*student_loss.*prompt gradient.*examples"):
        trainer.fit()
    saved = json.loads((tmp_path / "run/nonfinite-step-2.json").read_text())
    assert [example["index"] for example in saved["examples"]] == indices and "student gradient" in saved["values"]
    before = poison(2, options(tmp_path / "skips", *config, "--skip-nonfinite", "1"))
    before.fit()
    rows = rows_of(tmp_path / "skips")
    assert [row["event"] for row in rows] == ["train", "skipped", "train", "train", "train"]
    assert all(bool(torch.isfinite(p).all()) for p in before.method.student.module.parameters())


def test_the_allowance_counts_once_over_restarts(options, tmp_path):
    """One step may go wrong: one does before the kill; the next one, after it, ends the run."""
    argv = options(tmp_path / "run", "--skip-nonfinite", "1", method="sft")
    crash(poison(2, argv), 5)
    with pytest.raises(RunError, match="sft, step 5: not finite"):
        poison(5, [*argv, "--resume"]).fit()
    assert [row["event"] for row in rows_of(tmp_path / "run")] == ["train", "skipped", "train", "train"]
