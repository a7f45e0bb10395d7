"""Which options a resumed run may change: those that are declared to change no number, and no others."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from helpers.runs import crash_at, rows_of, tiny_argv
from helpers.training import train_here

from promptkd.checkpointing.fingerprint import RunFingerprint
from promptkd.config.lora_options import LoraSettings
from promptkd.config.options import DataSettings, DecodingSettings, ModelSettings, RunSettings, TrainingParallelSettings
from promptkd.config.parser import declared_options
from promptkd.config.reporting_options import ReportingSettings
from promptkd.config.values import option
from promptkd.errors import UserError
from promptkd.methods.registry import METHODS, method_class
from promptkd.training.setup import build_trainer
from train import read_settings, resolve

COMMON = (
    RunSettings, ModelSettings, LoraSettings, TrainingParallelSettings, DataSettings, DecodingSettings,
    ReportingSettings,
)  # fmt: skip
FREE = {  # option -> another value of it
    "save": None,  # the folder of the run itself
    "overwrite": None,  # excludes --resume
    "resume": "auto",
    "resume_anyway": True,
    "keep_checkpoints": 5,
    "checkpoint_every": 3,
    "checkpoint_minutes": 7.5,
    "skip_nonfinite": 3,
    "log_interval": 2,
    "profile": True,
    "eval_interval": 1,
    "eval_gen": False,
    "curves": False,
    "exposure_bias_every": 2,
    "exposure_bias_rows": 1,
    "model_path": "COPY",  # the same files elsewhere
    "model_type": "gpt2",
    "teacher_model_path": "COPY",
    "data_dir": "COPY",
    "dev_num": 1,
    "deepspeed_config": "COPY",
    "rouge_tokenizer": "published",
    "eval_batch_size": 2,
    "rollout_token_budget": 999,
    "teacher_deepspeed_config": None,  # its content is compared
    "prompt_data_dir": "COPY",
    "lm_data_dir": "COPY",
    "student_data_dir": None,  # needs a second set of responses
    "seed_lm": 8,
    "report_to": None,  # needs optional packages
    "push_to_hub": None,  # needs a token
    "prompt_init": None,  # its content is compared
    "merge": None,  # needs adapters
}


def options_of(method: str) -> dict[str, dataclasses.Field]:
    kind = method_class(method)
    return declared_options((*COMMON, kind.OptimizerSettings, kind.Settings))


def test_every_option_is_classified_and_the_free_ones_are_known():
    declared = {name: field for method in METHODS for name, field in options_of(method).items()}
    assert {name for name, field in declared.items() if not field.metadata["numbers"]} == set(FREE)
    assert all(isinstance(field.metadata["numbers"], bool) for field in declared.values())
    assert option(1, "an option of which nothing else is said").metadata["numbers"]  # the default: it matters


@pytest.mark.parametrize("method", METHODS)
def test_identity_differs_by_what_matters_and_by_nothing_else(method):
    declared = options_of(method)
    values = {name: field.default for name, field in declared.items()}
    saved = vars(RunFingerprint.of(values, {}, {}, 1))
    for name, field in declared.items():
        now = RunFingerprint.of({**values, name: "another"}, {}, {}, 1)
        assert bool(now.differences(saved, declared)) == field.metadata["numbers"], name


def test_identity_takes_an_option_that_an_older_checkpoint_lacks_as_its_default():
    declared = options_of("sft")
    values = {name: field.default for name, field in declared.items()}
    saved = vars(
        RunFingerprint.of({name: value for name, value in values.items() if name != "weight_decay"}, {}, {}, 1)
    )
    assert not RunFingerprint.of(values, {}, {}, 1).differences(saved, declared)
    assert RunFingerprint.of({**values, "weight_decay": 0.5}, {}, {}, 1).differences(saved, declared)
    gone = {**saved, "options": {**saved["options"], "an_older_option": 3}}
    assert RunFingerprint.of(values, {}, {}, 1).differences(gone, declared) == ["--an-older-option None (there: 3)"]


@pytest.mark.parametrize(
    ("value", "refused"), [("hf", []), ("vllm", ["--rollout-engine vllm (removed after version 0.1.0)"])]
)
def test_fingerprint_accepts_a_removed_option_only_with_its_remaining_value(value, refused):
    declared = options_of("promptkd")
    now = RunFingerprint.of({name: field.default for name, field in declared.items()}, {}, {}, 1)
    saved = {**vars(now), "options": {**now.options, "rollout_engine": value}}
    assert now.differences(saved, declared) == refused


@pytest.mark.parametrize("method", ["promptkd", "minillm"])
def test_resume_is_accepted_with_every_free_option_changed(method, tmp_path):
    argv = tiny_argv(method, tmp_path / "run", "--batch-size", "2", "--max-length", "98", "--total-iters", "3")
    argv += ["--checkpoint-every", "1"]
    crash_at(3, argv)
    declared, settings = options_of(method), read_settings(argv)
    groups = [group for group in vars(settings).values() if dataclasses.is_dataclass(group)]
    now, extra = {key: value for group in groups for key, value in vars(group).items()}, []
    for name, value in FREE.items():
        if name not in declared or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if value == "COPY" and now[name]:
            value = shutil.copytree(now[name], tmp_path / f"copy_of_{name}")
        elif value == "COPY":
            continue
        extra += [f"--no-{name.replace('_', '-')}"] if value is False else [flag, *([] if value is True else [value])]
    trainer = build_trainer(resolve([*argv, *map(str, extra), "--no-resume-anyway"]))
    assert trainer.done == 2
    trainer.fit()
    assert not (tmp_path / "run/curves.png").exists()  # --no-curves, and the first process stopped before it drew
    assert json.loads(json.dumps(rows_of(tmp_path / "run")))[-1]["step"] == 3


def test_resume_with_another_option_is_refused(tmp_path):
    argv = tiny_argv("sft", tmp_path / "run", "--batch-size", "2", "--max-length", "98", "--total-iters", "2")
    crash_at(2, [*argv, "--checkpoint-every", "1"])
    with pytest.raises(UserError, match="--top-k 3"):
        train_here([*argv, "--resume", "--top-k", "3"])
