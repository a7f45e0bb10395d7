"""promptkd as a library: the notebook, runs in one process, interruptions, and what other programs load."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.runs import rows_of
from helpers.training import GOLDEN, ROOT

import promptkd
from promptkd.api import Results, Run
from promptkd.distributed.process_state import end_process_group
from promptkd.methods.registry import METHODS
from promptkd.models.soft_prompt import load_prompt

TEACHER = GOLDEN / "models/gpt2_teacher"
MODELS = {"model_path": GOLDEN / "models/gpt2_student", "teacher_model_path": TEACHER}
DATA = {"data_dir": GOLDEN / "processed/dolly/full/gpt2", "max_length": 128, "max_prompt_length": 96, "dev_num": 0}


def process_state() -> list:
    """What a run in this process must leave as it was."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    draws = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    switches = torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.get_default_dtype()
    attention = torch.backends.cuda.cudnn_sdp_enabled()  # which runs on a GPU turn off
    return [dict(os.environ), handlers, draws, switches, attention, sys.excepthook, dist.is_initialized()]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The variables of docs/notebook.py after it ran, with the process state before and after."""
    folder, methods = tmp_path_factory.mktemp("notebook"), dict(METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if dist.is_initialized():  # by an earlier test; with a group of its own the library has more to restore
            end_process_group()
        before = process_state()
        variables = runpy.run_path(str(ROOT / "docs/notebook.py"), run_name="notebook")
        after = process_state()
    added = METHODS.keys() - methods.keys()
    for name in added:
        del METHODS[name]
    return SimpleNamespace(**variables, at=folder / "results/notebook", states=(before, after), added=added)


def test_notebook_trains_plots_evaluates_and_registers(notebook):
    assert notebook.added == {"on_policy_kd"}
    assert isinstance(notebook.run, Run) and isinstance(notebook.results, Results)
    steps = [row["step"] for row in notebook.own.metrics if row["event"] == "train"]
    assert steps == [1, 2, 3] and all("loss" in row for row in notebook.own.metrics if row["event"] == "train")
    assert list(notebook.run.best) == ["best_rougeL", "best_loss"] and notebook.run.settings["method"] == "promptkd"
    for picture in ("dev_loss.png", "promptkd/curves.png"):
        assert (notebook.at / picture).read_bytes().startswith(b"\x89PNG")
    stored = json.loads((notebook.at / "promptkd/eval/results.json").read_text())
    assert notebook.results.sets == stored["sets"] and len(stored["sets"]["dolly"]["rougeL"]["per_seed"]) == 2
    assert "| dolly " in notebook.results.text and notebook.answer.shape == (1, 8)


def test_evaluate_stored_answers_returns_the_results_of_their_folder(notebook):
    results = promptkd.evaluate(answers=notebook.at / "promptkd/eval", metrics="self_bleu")
    assert results.folder == notebook.at / "promptkd/eval" and "self_bleu" in results.sets["dolly"]["metrics"]


def test_runs_leave_the_process_as_it_was(notebook):
    before, after = notebook.states
    assert after == before and not before[-1]


@pytest.mark.cpu
def test_train_gives_the_same_run_twice_in_one_process(notebook, tmp_path):
    torch.rand(3)
    options = {**MODELS, **notebook.DATA, **notebook.SHORT}
    again = promptkd.train(method="promptkd", **options, save=tmp_path / "again")
    assert rows_of(again.folder) == rows_of(notebook.at / "promptkd") and again.best == notebook.run.best
    assert again.curves.is_file() and again.student.name == "best_rougeL" and again.prompt == tmp_path / "again/prompt"


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_train_works_where_a_notebook_has_turned_gradients_off(tmp_path, off):
    with off():
        run = promptkd.train(
            method="sft", model_path=MODELS["model_path"], **DATA, total_iters=1, batch_size=2, save=tmp_path / "run"
        )
        assert not torch.is_grad_enabled()
    assert [row["step"] for row in run.metrics] == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "kd", "bach_size": 4}, "unknown option --bach-size: did you mean --batch-size?"),
        ({"methd": "kd"}, "--method is missing"),
        ({"method": "kdd"}, r"\(did you mean kd\?\)"),
        ({"method": "sft", "model_path": "/none", "dry_run": True}, "help and dry_run end the process"),
        ({"method": "kd", "lr": object()}, r"train\(\): lr is a object: give a number"),
        ({"method": "kd", "seed": 3, "lora_r": [2, 3]}, "--lora-r has the value '3' too many: leave it out"),
        ({"method": "kd", "overwrite": ["yes"]}, "--overwrite has the value 'yes' too many"),
        ({"method": "sft", "model_path": "/none", "data_dir": "/none"}, "--model-path /none: no such folder"),
    ],
)
def test_train_bad_options_are_exceptions(options, message, capsys):
    with pytest.raises(promptkd.UserError, match=message) as error:
        promptkd.train(**options)
    assert isinstance(error.value, promptkd.PromptKDError) and "\n" not in str(error.value)


def test_evaluate_bad_options_are_exceptions():
    with pytest.raises(promptkd.UserError, match="unknown option --seedz: did you mean --seed"):
        promptkd.evaluate(model_path=MODELS["model_path"], seedz=(10, 20))


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ([signal.SIGINT], KeyboardInterrupt, "resume='must' continues"),
        ([signal.SIGINT, signal.SIGINT], KeyboardInterrupt, "^$"),
        ([signal.SIGUSR1], promptkd.RunError, "resume='must' continues"),
    ],
    ids=["interrupt", "two interrupts", "SIGUSR1"],
)
def test_train_signal_is_an_exception_and_the_run_resumes(numbers, error, message, tmp_path, monkeypatch):
    from minillm_baselines.sft import SFT

    class Interrupted(SFT):
        def step(self, step_batch):
            row = super().step(step_batch)
            if step_batch.step == 2 and not (tmp_path / "sent").exists():
                (tmp_path / "sent").touch()
                for number in numbers:
                    os.kill(os.getpid(), number)
            return row

    monkeypatch.setitem(METHODS, "interrupted", Interrupted)
    options = {"model_path": MODELS["model_path"], **DATA, "total_iters": 3, "batch_size": 4, "save": tmp_path / "run"}
    handlers = [signal.getsignal(each) for each in signal.valid_signals()]
    with pytest.raises(error, match=message):
        promptkd.train(method="interrupted", **options)
    assert [signal.getsignal(each) for each in signal.valid_signals()] == handlers
    if numbers == [signal.SIGINT]:
        run = promptkd.train(method="interrupted", **options, resume="must")
        assert [row["step"] for row in run.metrics] == [1, 2, 3] and run.best == {} and run.student.name == "last"


def test_load_prompted_teacher_equals_peft_and_ignores_padding(notebook):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    teacher = promptkd.load_prompted_teacher(TEACHER, notebook.at / "promptkd/prompt")
    base = AutoModelForCausalLM.from_pretrained(TEACHER)
    peft = PeftModel.from_pretrained(base, str(notebook.at / "promptkd/prompt")).eval()
    short, long = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10, 11, 12, 13, 14]])
    with torch.no_grad():
        theirs = peft(input_ids=short, attention_mask=torch.ones_like(short)).logits[:, -4:]
        ours = teacher(short)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, base(short).logits, atol=1e-3)
        padded = torch.cat([torch.nn.functional.pad(short, (2, 0)), long])
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        torch.testing.assert_close(teacher(padded, mask)[:1, 2:], ours, rtol=1e-4, atol=1e-4)
        greedy = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
        assert teacher.generate(padded, mask, **greedy)[0].tolist() == teacher.generate(short, **greedy)[0].tolist()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(promptkd.UserError, match="the teacher /none: no such folder"):
        promptkd.load_prompted_teacher("/none", notebook.at / "promptkd/prompt")
    assert torch.equal(
        teacher.prompt.embeddings, load_prompt(notebook.at / "promptkd/prompt", teacher.prompt(1).size(-1))
    )


def greedy_answers(student, prompts: list[str]) -> list[str]:
    """The answers of a saved student by transformers' pipeline."""
    from transformers import pipeline

    generator = pipeline("text-generation", model=str(student), device="cpu", dtype=torch.float32)
    outputs = generator(prompts, max_new_tokens=16, do_sample=False, return_full_text=False)
    return [output[0]["generated_text"] for output in outputs]


def test_saved_student_answers_in_a_pipeline(notebook):
    from transformers import AutoModelForCausalLM

    student = notebook.at / "promptkd/best_rougeL"
    rows = [json.loads(line) for line in (DATA["data_dir"] / "valid.jsonl").read_text().splitlines()[:2]]
    tokenizer = notebook.teacher.tokenizer
    model = AutoModelForCausalLM.from_pretrained(student)
    for row, answer in zip(rows, greedy_answers(student, [row["prompt"] for row in rows])):
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        for _ in range(16):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert answer and tokenizer.decode(ids[0, -16:]).startswith(answer)


def test_saved_student_answers_in_lm_eval(notebook, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = (ROOT / "docs/lm_eval/promptkd_answers.yaml").read_text().replace("tests/golden", str(GOLDEN))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/answers.yaml").write_text(text.replace("max_gen_toks: 32", "max_gen_toks: 16"))
    student = shutil.copytree(notebook.at / "promptkd/best_rougeL", tmp_path / "student")
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(student), "dtype": "float32"}, tasks=["promptkd_answers"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks")), device="cpu", batch_size=1, limit=2,
        bootstrap_iters=0,
    )  # fmt: skip
    samples = found["samples"]["promptkd_answers"]
    theirs = [sample["resps"][0][0] for sample in samples]
    ours = greedy_answers(student, [sample["doc"]["prompt"] for sample in samples])
    assert theirs == [answer.split("\n\n")[0] for answer in ours] and all(theirs)
    assert 0 <= found["results"]["promptkd_answers"]["exact_match,none"] <= 1
