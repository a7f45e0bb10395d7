"""Tests on a GPU, and how the tests choose their device (`PROMPTKD_TEST_DEVICE=cuda` on a machine with a GPU)."""

import json

import conftest
import pytest
from helpers import training
from helpers.resuming import check_resume
from helpers.training import GOLDEN, ROOT, golden_argv, need_gpus, start

CONFIGS = ROOT / "configs" / "deepspeed"


def test_golden_argv_on_gpu_stays_in_float32(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "DEVICE", "cuda")
    argv = golden_argv("promptkd", tmp_path)
    file = argv[argv.index("--deepspeed_config") + 1]
    content = json.loads((CONFIGS / file).read_text())
    assert "bf16" not in content and "fp16" not in content and "--deterministic" in argv
    monkeypatch.setattr(training, "DEVICE", "cpu")
    assert "--deepspeed_config" not in golden_argv("promptkd", tmp_path)


@pytest.mark.parametrize("device, skipped", [("cpu", "test_on_gpu"), ("cuda", "test_on_cpu")])
def test_collection_skips_the_other_device_with_a_reason(device, skipped, monkeypatch, request):
    monkeypatch.setattr(training, "DEVICE", device)
    reasons = {}

    class Item:
        def __init__(self, name):
            self.name = name

        def get_closest_marker(self, marker):
            return marker == self.name.rpartition("_")[2]

        def add_marker(self, mark):
            reasons[self.name] = mark.kwargs["reason"]

    conftest.pytest_collection_modifyitems(request.config, [Item(f"test_on_{name}") for name in ("cpu", "gpu", "any")])
    assert list(reasons) == [skipped] and "PROMPTKD_TEST_DEVICE" in reasons[skipped]


def test_need_gpus_skips_where_ranks_outnumber_gpus(monkeypatch):
    monkeypatch.setattr(training, "DEVICE", "cpu")
    need_gpus(64)  # ranks on a CPU need none
    monkeypatch.setattr(training, "DEVICE", "cuda")
    monkeypatch.setattr(training, "gpu_count", lambda: 1)
    need_gpus(1)
    with pytest.raises(pytest.skip.Exception, match="2 ranks need 2 GPUs"):
        need_gpus(2)


def test_configure_refuses_missing_gpu_and_unknown_device(monkeypatch, request):
    for device, message in (("cuda", "finds no GPU"), ("tpu", "set it to cpu or cuda")):
        monkeypatch.setattr(training, "DEVICE", device)
        monkeypatch.setattr(training, "gpu_count", lambda: 0)
        with pytest.raises(pytest.UsageError, match=message):
            conftest.pytest_configure(request.config)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ds_config", "ds_config_bf16", "ds_config_zero2_offload", "ds_config_zero3_fp32"])
def test_gpu_deterministic_resume_is_bitwise(name, options, tmp_path):
    check_resume(options, tmp_path, "--deterministic", "--deepspeed_config", str(CONFIGS / f"{name}.json"))


@pytest.mark.gpu
def test_gpu_evaluate_answers(tmp_path):
    rows = json.dumps({"instruction": "Name a color.", "input": "", "output": "Blue."}) + "\n"
    (tmp_path / "data/dolly").mkdir(parents=True)
    (tmp_path / "data/dolly/valid.jsonl").write_text(rows * 2)
    lengths = ["--max-length", "108", "--max-prompt-length", "96"]
    argv = ["--model-path", str(GOLDEN / "models/gpt2_student"), "--data-dir", str(tmp_path / "data"), *lengths]
    done = start([*argv, "--data-names", "dolly", "--save", str(tmp_path / "eval")], script="evaluate.py")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "eval/results.json").read_text())["run"]["device"] == "cuda"
