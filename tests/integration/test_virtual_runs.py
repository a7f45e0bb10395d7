"""The main path of every script on a virtual GPU: no operands on two devices, and a resumed run equals a straight one.

Each DeepSpeed file runs with PromptKD, each method with one file, on one rank and on two. gloo stands in for NCCL.
"""

import json
import signal

import pytest
import torch
from helpers.runs import assert_same_run, rows_of
from helpers.training import GOLDEN, ROOT
from helpers.virtual_machine import VirtualMachine

pytestmark = pytest.mark.cpu

CONFIGS = ROOT / "configs" / "deepspeed"
FILES = sorted(path.stem for path in CONFIGS.glob("*.json"))
COMMON = ("ds_config", "ds_config_bf16", "ds_config_zero3_fp32")
SHORT = ["--total-iters", "2", "--checkpoint-every", "0", "--max-length", "100"]
MODELS = ["--model-path", GOLDEN / "models/gpt2_student", "--teacher-model-path", GOLDEN / "models/gpt2_teacher"]
DATA = GOLDEN / "processed/dolly/full/gpt2"
SIGTERM_STATUS = 128 + signal.SIGTERM


@pytest.fixture(scope="session")
def machine():
    running = VirtualMachine()
    yield running
    running.close()


def config(name: str) -> list[str]:
    return ["--deepspeed_config", str(CONFIGS / f"{name}.json")]


def succeed(machine, script: str, argv: list, status: int = 0, **how):
    """Run a script; every rank has to end with this status. Returns the first rank's run."""
    runs = machine.run(script, list(map(str, argv)), **how)
    assert [run.status for run in runs] == [status] * len(runs), "\n".join(run.output[-3000:] for run in runs)
    return runs[0]


def check_stop_and_resume(machine, options, folder, *extra: str, method: str = "promptkd", ranks: int = 1):
    """A run that SIGTERM stops after its first step and that is resumed equals a straight run, bit for bit."""
    straight, stopped = folder / "straight", folder / "stopped"
    run = succeed(machine, "train", options(straight, *SHORT, *extra, method=method), ranks=ranks)
    argv = options(stopped, *SHORT, *extra, method=method)
    succeed(machine, "train", argv, status=SIGTERM_STATUS, stop=1, ranks=ranks)
    assert [row["step"] for row in rows_of(stopped) if row["event"] == "train"] == [1]
    succeed(machine, "train", [*argv, "--resume"], ranks=ranks)
    assert_same_run(straight, stopped)
    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in COMMON else pytest.mark.slow) for name in FILES]
)
def test_virtual_gpu_promptkd_stop_and_resume_with_each_file(name, machine, options, tmp_path):
    check_stop_and_resume(machine, options, tmp_path, *config(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ds_config_bf16", "ds_config_zero3_fp32"])
def test_virtual_gpu_adapters_stop_and_resume(name, machine, options, tmp_path):
    lora = ["--lora-r", "4", "--lora-dropout", "0.1", "--gradient-checkpointing"]
    check_stop_and_resume(machine, options, tmp_path, *config(name), *lora, "--dev-num", "2")
    assert (tmp_path / "straight/last/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "method", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "kd", "minillm")), "distillm"]
)
def test_virtual_gpu_methods_with_evaluation_stop_and_resume(method, machine, options, tmp_path):
    extra = ["--dev-num", "2", *config("ds_config_bf16")]
    if method != "sft":
        extra += ["--exposure-bias-every", "1", "--exposure-bias-rows", "2"]
    run = check_stop_and_resume(machine, options, tmp_path, *extra, method=method)
    assert {"build", "step", "evaluate", "save"} <= run.phases.keys()


@pytest.mark.parametrize("method, extra", [("minillm", []), ("gkd", []), ("distillm2", ["--student-data-dir", DATA])])
def test_virtual_gpu_method_takes_steps(method, extra, machine, options, tmp_path):
    argv = options(tmp_path / "run", *SHORT, *config("ds_config_bf16"), *extra, method=method)
    succeed(machine, "train", argv)


@pytest.mark.parametrize(
    "method, name",
    [
        pytest.param("promptkd", "ds_config_zero3_fp32", marks=pytest.mark.slow),
        ("kd", "ds_config_zero2_offload"),
        pytest.param("minillm", "ds_config", marks=pytest.mark.slow),
    ],
)
def test_virtual_gpu_two_ranks_stop_and_resume(method, name, machine, options, tmp_path):
    extra = ["--batch-size", "1", *config(name)]
    run = check_stop_and_resume(machine, options, tmp_path, *extra, method=method, ranks=2)
    assert run.facts["process_group"] == {"backend": "nccl", "device_id": "cuda:0"}


@pytest.mark.parametrize("name", [pytest.param("ds_config_bf16", marks=pytest.mark.slow), "ds_config_zero3_fp32"])
def test_virtual_gpu_resume_on_fewer_ranks(name, machine, options, tmp_path):
    argv = options(tmp_path / "run", *SHORT, *config(name), method="sft")
    succeed(machine, "train", [*argv, "--batch-size", "1"], status=SIGTERM_STATUS, stop=1, ranks=2)
    run = succeed(machine, "train", [*argv, "--batch-size", "2", "--resume"])
    assert "is of 2 ranks, these are 1" in run.output
    assert [row["step"] for row in rows_of(tmp_path / "run") if row["event"] == "train"] == [1, 2]


def test_virtual_gpu_two_ranks_of_tensor_parallelism(machine, options, tmp_path):
    argv = options(tmp_path / "run", *SHORT, *config("ds_config_bf16"))
    succeed(machine, "train", [*argv, "--model-parallel", "--model-parallel-size", "2"], ranks=2)


def data_argv(folder) -> list:
    """Options of evaluate.py on two rows."""
    rows = [{"prompt": "Name a color.", "instruction": "Name a color.", "input": "", "output": "Blue."}] * 2
    (folder / "data/dolly").mkdir(parents=True)
    (folder / "data/dolly/valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--data-dir", folder / "data", "--data-names", "dolly", "--max-length", "108", "--max-prompt-length", "96"]


def test_virtual_gpu_evaluate_answers_on_one_rank_and_two(machine, tmp_path):
    argv = [*MODELS[:2], *data_argv(tmp_path), "--seeds", "10", "20"]
    for ranks in (1, 2):
        succeed(machine, "evaluate", [*argv, "--save", tmp_path / f"{ranks}"], ranks=ranks)
    found = [json.loads((tmp_path / f"{ranks}/results.json").read_text()) for ranks in (1, 2)]
    assert [results["run"]["device"] for results in found] == ["cuda", "cuda"]
    assert found[0]["sets"]["dolly"]["rougeL"] == found[1]["sets"]["dolly"]["rougeL"]


def test_virtual_gpu_exposure_bias_evaluation_deterministic(machine, tmp_path):
    argv = [*MODELS, *data_argv(tmp_path), "--type", "exposure_bias", "--save", tmp_path / "bias", "--deterministic"]
    succeed(machine, "evaluate", argv)
    assert json.loads((tmp_path / "bias/results.json").read_text())["run"]["deterministic"] is True


def test_virtual_gpu_generate_answers(machine, tmp_path):
    data = data_argv(tmp_path)
    (tmp_path / "data/dolly/valid.jsonl").rename(tmp_path / "data/dolly/train.jsonl")
    succeed(machine, "generate", [*MODELS[:2], *data, "--save", tmp_path / "gen"])
    assert len((tmp_path / "gen/generated.jsonl").read_text().splitlines()) == 2


def test_virtual_gpu_without_file_takes_bf16_or_fp16(machine, options, tmp_path):
    """The allocator's segments are expandable before the first allocation, unless the user has set it."""
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        argv = options(tmp_path / f"{bf16}", *SHORT, "--total-iters", "1", method="sft")
        mine = {} if bf16 else {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
        run = succeed(machine, "train", argv, bf16=bf16, **mine)
        assert run.facts["dtypes"] == [str(dtype)]
        assert run.facts["allocator"] == ("expandable_segments:True" if bf16 else None)


def test_virtual_gpu_deterministic_changes_no_number_and_has_to_agree(machine, options, tmp_path):
    def argv(save, *extra):
        return options(tmp_path / save, *SHORT, "--top-p", "0.9", *config("ds_config_fp32"), *extra)

    succeed(machine, "train", argv("plain"))
    succeed(machine, "train", argv("deterministic", "--deterministic"), status=SIGTERM_STATUS, stop=1)
    run = succeed(machine, "train", argv("deterministic", "--resume"), status=2)
    assert "--deterministic False (there: True)" in run.output
    succeed(machine, "train", argv("deterministic", "--deterministic", "--resume"))
    plain, other = (rows_of(tmp_path / name) for name in ("plain", "deterministic"))
    for row, expected in zip(other, plain, strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("memory", [300_000, 2_000_000])
def test_virtual_gpu_out_of_memory_ends_with_one_line(memory, machine, options, tmp_path):
    """The models do not fit, or a step does not."""
    run = succeed(machine, "train", options(tmp_path / "run", *SHORT), status=1, memory=memory)
    (line,) = [line for line in run.output.splitlines() if "error" in line]
    assert "the GPU has not enough memory" in line and "--token-budget" in line and "Traceback" not in run.output


@pytest.mark.parametrize(
    "method, name, most",
    [
        ("promptkd", "ds_config_bf16", 13),
        pytest.param("promptkd", "ds_config", 13, marks=pytest.mark.slow),
        pytest.param("promptkd", "ds_config_fp32", 7, marks=pytest.mark.slow),
        ("kd", "ds_config_bf16", 7),
        pytest.param("minillm", "ds_config_bf16", 9, marks=pytest.mark.slow),
    ],
)
def test_virtual_gpu_waits_of_a_step_stay_within_budget(method, name, most, machine, options, tmp_path):
    """Waits of the host for the GPU outside of decoding. They do not grow with the number of micro-batches.

    DeepSpeed's timers wait from the third step on. Its optimizer's waits are 6 of the student's 7, 4 of the prompt's 5.
    """
    argv = options(tmp_path / "run", *SHORT, "--total-iters", "4", "--token-budget", "60", *config(name), method=method)
    run = succeed(machine, "train", argv)
    waits = run.count("waits", "step") - run.count("waits", "step/rollout")
    assert waits <= 4 * most, [wait for wait in run.waits if wait[1].startswith("step")]
    assert run.count("launches", "step") > 0 and run.count("collectives", "step") > 0
