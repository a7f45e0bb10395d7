"""Engines: ZeRO stages agree, the teacher stays as it is, precision, configuration files."""

import pytest
import torch
from helpers.deepspeed_files import zero_file
from helpers.runs import student_with_dropout
from helpers.training import GOLDEN, ROOT, golden_argv, metrics_of, start, train_here

from promptkd.config.deepspeed import CONFIGS, read_deepspeed_config
from promptkd.errors import UserError
from promptkd.training.setup import build_trainer
from train import resolve

CPU = torch.device("cpu")


def losses(save) -> list[list[float]]:
    return [[value for key, value in row.items() if key.endswith("loss")] for row in metrics_of(save)]


def argv(tmp_path, name: str, *extra: str, method: str = "promptkd") -> list[str]:
    return golden_argv(method, tmp_path / name, "--batch-size", "2", "--total-iters", "4", *extra)


@pytest.mark.parametrize("method", ["promptkd", pytest.param("kd", marks=pytest.mark.slow)])
def test_zero_stages_agree(method, tmp_path):
    train_here(argv(tmp_path, "reference", method=method))
    for stage, offload in [(1, False), (2, False), (2, True), (3, False)]:
        name = f"zero{stage}{offload}"
        file = zero_file(tmp_path, stage, offload=offload)
        train_here(argv(tmp_path, name, "--deepspeed_config", file, method=method))
        for expected, values in zip(losses(tmp_path / "reference"), losses(tmp_path / name), strict=True):
            assert values == pytest.approx(expected, abs=1e-5), name
        norms = [[row["grad_norm"] for row in metrics_of(tmp_path / run)] for run in ("reference", name)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-3), name


def test_zero_3_on_two_ranks_with_packing(tmp_path):
    train_here(argv(tmp_path, "alone"))
    extra = ["--batch-size", "1", "--token-budget", "70", "--deepspeed_config", zero_file(tmp_path, 3)]
    done = start(golden_argv("promptkd", tmp_path / "ranks", "--total-iters", "4", *extra), ranks=2)
    assert done.returncode == 0, done.stderr
    for expected, values in zip(losses(tmp_path / "alone"), losses(tmp_path / "ranks"), strict=True):
        assert values == pytest.approx(expected, abs=1e-5)
    saved = [(tmp_path / run / "last/model.safetensors").stat().st_size for run in ("alone", "ranks")]
    assert saved[0] == saved[1]


def test_bf16_is_near_fp32(tmp_path):
    train_here(argv(tmp_path, "fp32", "--no-do-sample"))
    extra = ["--deepspeed_config", str(CONFIGS / "ds_config_bf16.json"), "--no-do-sample"]
    train_here(argv(tmp_path, "bf16", *extra))
    for expected, values in zip(losses(tmp_path / "fp32"), losses(tmp_path / "bf16"), strict=True):
        assert values == pytest.approx(expected, abs=0.03)


def test_only_the_prompt_of_the_teacher_is_trained(tmp_path):
    from safetensors.torch import load_file

    trainer = train_here(argv(tmp_path, "run"))
    module = trainer.method.teacher.module
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["prompt.embeddings"]
    before = load_file(GOLDEN / "models/gpt2_teacher/model.safetensors")
    after = module.model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name if name in after else f"transformer.{name}"].cpu(), tensor), name
    optimizer = trainer.method.teacher.engine.basic_optimizer
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert sum(state.numel() for state in states) == 2 * module.prompt.embeddings.numel()
    assert float((trainer.method.prompt() - trainer.method.initial_prompt).norm()) > 0


def test_dropout_acts_in_distillation_alone(tmp_path):
    trainer = train_here(argv(tmp_path, "run"))
    modes = {}
    for learner, name in ((trainer.method.student, "student"), (trainer.method.teacher, "prompt")):
        inner = learner.update

        def spy(batches, loss_of, name=name, inner=inner):
            modes[name] = {k: learner.module.training for k, learner in trainer.method.learners().items()}
            return inner(batches, loss_of)

        learner.update = spy
    rollout = trainer.method.rollout
    trainer.method.rollout = lambda *given, **how: (
        rollout(*given, **how),
        modes.update(rollout=trainer.method.student.module.training),
    )[0]
    trainer.method.step(trainer.local_batch(1))
    assert modes == {
        "rollout": False,
        "prompt": {"student": False, "prompt": False},
        "student": {"student": True, "prompt": False},
    }


def test_shipped_files_are_readable_and_leave_rates_to_the_command_line():
    files = sorted(CONFIGS.glob("*.json"))
    names = {"ds_config", "ds_config_fp32", "ds_config_zero2", "ds_config_zero2_offload", "ds_config_bf16"}
    assert names <= {file.stem for file in files}
    for file in files:
        read_deepspeed_config(str(file), torch.device("cuda"))


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"optimizer": {"type": "Adam"}}', "sets optimizer"),
        ('{"gradient_clipping": 1.0}', "--clip-grad"),
        ('{"train_batch_size": 8}', "--batch-size"),
        ('{"fp16": {"enabled": true}}', "fp16"),
        ('{"bf16": {"enabled": true}}', "bf16 without ZeRO"),
        ('{"fp16": {"enabled": false, "hysteresis": 0}}', "fp16.hysteresis"),
        ("[1]", "no JSON object"),
        ("{", "ds.json"),
    ],
)
def test_bad_files_are_refused(content, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_deepspeed_config(str(path), CPU)


def test_fp16_without_zero_is_refused(tmp_path):
    """DeepSpeed would divide by a loss scale that it never multiplied with."""
    path = tmp_path / "ds.json"
    path.write_text('{"fp16": {"enabled": true}, "zero_optimization": {"stage": 0}}')
    for option in ("--deepspeed_config", "--teacher-deepspeed-config"):
        with pytest.raises(UserError, match=f"{option} .*fp16 without ZeRO: set zero_optimization.stage to 1 or more"):
            read_deepspeed_config(str(path), torch.device("cuda"), option)


@pytest.mark.cpu
def test_fp16_on_a_cpu_ends_with_one_line_and_writes_nothing(tmp_path):
    extra = ["--deepspeed_config", str(ROOT / "configs/deepspeed/ds_config.json")]
    done = start(argv(tmp_path, "run", *extra))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ds_config_fp32.json" in done.stderr
    assert not (tmp_path / "run").exists()


def test_recomputed_activations_change_nothing(tmp_path):
    """Student with dropout, teacher with its prompt: every layer of both runs again in the backward pass."""
    student = student_with_dropout(tmp_path / "student")
    calls = {}
    for name, extra in (("kept", []), ("recomputed", ["--gradient-checkpointing"])):
        options = argv(tmp_path, name, "--total-iters", "2", "--model-path", str(student), *extra)
        trainer = build_trainer(resolve(options))
        for which, learner in trainer.method.learners().items():
            # Before the forward pass: recomputing stops as soon as nothing more is needed, maybe inside of it.
            learner.module.model.base_model.h[0].mlp.register_forward_pre_hook(
                lambda *_, key=(name, which): calls.update({key: calls.get(key, 0) + 1})
            )
        trainer.fit()
    for expected, values in zip(losses(tmp_path / "kept"), losses(tmp_path / "recomputed"), strict=True):
        assert values == pytest.approx(expected, abs=1e-6)
    for which in ("student", "prompt"):
        assert calls["recomputed", which] == calls["kept", which] + 2, which
