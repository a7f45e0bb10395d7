"""The recorded cases as options, and their comparison with a run's metrics."""

from __future__ import annotations

import pytest

from helpers.training import golden_argv, metrics_of

NOT_OPTIONS = ("model_type", "method", "precision", "adam_betas", "adam_eps", "scheduler")
NOT_COMPARED = {"sft": {"ds_loss"}}


def case_argv(case: dict, save, *extra: str) -> list[str]:
    argv = golden_argv(case["options"]["method"], save)
    for name, value in case["options"].items():
        flag = "--" + name.replace("_", "-")
        if name in NOT_OPTIONS:
            continue
        argv += [flag if value else flag.replace("--", "--no-", 1)] if isinstance(value, bool) else [flag, str(value)]
    return [*argv, "--no-eval-gen", *extra]


def compare(case: dict, save, tolerance: float = 1e-5) -> None:
    rows = metrics_of(save)
    assert len(rows) == len(case["steps"])
    for row, expected in zip(rows, case["steps"]):
        for key in expected.keys() - NOT_COMPARED.get(case["options"]["method"], set()):
            assert row[key] == pytest.approx(expected[key], abs=tolerance), f"step {row['step']}, {key}"
