"""SeqKD from the teacher's answers to a trained student: what the student learns are the teacher's words."""

import json
import shutil

import pytest
import torch
from helpers.generating import FULL, SIZES, STUDENT, TEACHER, generate_argv, generated, made_pseudo
from helpers.training import metrics_of, start, train_here

import promptkd.generation.answers
from minillm_baselines import kd
from promptkd.data.dataset import ExampleSet
from promptkd.data.encoding import TextEncoder
from promptkd.errors import UserError
from promptkd.evaluation.session import Session
from promptkd.models.loading import load_tokenizer
from promptkd.utils.jsonl import read_jsonl


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A folder with generated.jsonl."""
    save = tmp_path_factory.mktemp("generated")
    generated(save)
    return save


@pytest.fixture(scope="module")
def data(answers, tmp_path_factory):
    """The processed folder of pseudo targets."""
    save = tmp_path_factory.mktemp("pseudo") / "data"
    made_pseudo(answers / "generated.jsonl", save)
    return save


def test_every_training_prompt_is_answered_and_gold_stays_apart(answers):
    rows, gold = read_jsonl(answers / "generated.jsonl"), read_jsonl(FULL / "train.jsonl")
    assert [list(row) for row in rows] == [["prompt", "gen_answer", "output"]] * len(gold)
    assert [(row["prompt"], row["output"]) for row in rows] == [(row["prompt"], row["output"]) for row in gold]
    assert all(row["gen_answer"] and row["gen_answer"] != row["output"] for row in rows)


def test_an_interrupted_generation_goes_on(answers, tmp_path, monkeypatch):
    save = tmp_path / "again"
    shutil.copytree(answers, save)
    (save / "generated.jsonl").unlink()
    part = save / "answers-0.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:20]) + lines[20][:7])  # killed amid a line
    answered, decode = [], promptkd.generation.answers.decode

    def counted(model, request, *budget, **callbacks):
        answered.extend(request.prompts)
        return decode(model, request, *budget, **callbacks)

    monkeypatch.setattr(promptkd.generation.answers, "decode", counted)
    generated(save, "--token-budget", "300")  # other batches
    assert len(answered) == 34 - 20
    assert (save / "generated.jsonl").read_bytes() == (answers / "generated.jsonl").read_bytes()
    monkeypatch.setattr(Session, "load_answering", lambda *_: pytest.fail("the model is not needed"))
    generated(save)
    assert len(answered) == 34 - 20  # nothing is left to do


@pytest.mark.slow
def test_ranks_do_not_change_the_answers(answers, tmp_path):
    done = start(generate_argv(tmp_path), ranks=2, script="tools/generate.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "generated.jsonl").read_bytes() == (answers / "generated.jsonl").read_bytes()


@pytest.mark.parametrize("changed", [["--seed", "11"], ["--temperature", "0.5"], ["--gen-num", "5"]])
def test_other_settings_are_refused(changed, answers, tmp_path):
    save = tmp_path / "copy"
    shutil.copytree(answers, save)
    name = "prompts" if changed[0] == "--gen-num" else changed[0][2:]
    with pytest.raises(UserError, match=f"answers of another run: {name} is"):
        generated(save, *changed)
    assert len(generated(save, *changed, "--overwrite")) == (5 if name == "prompts" else 34)


def test_model_that_cannot_be_read_leaves_earlier_answers(answers, tmp_path):
    save, before = tmp_path / "copy", (answers / "generated.jsonl").read_bytes()
    shutil.copytree(answers, save)
    for folder in (save, tmp_path / "new"):
        with pytest.raises(UserError, match="no readable soft prompt"):
            generated(folder, "--prompt", str(FULL), "--overwrite")
    assert (save / "generated.jsonl").read_bytes() == before and not (tmp_path / "new").exists()


def test_pseudo_targets_are_the_teachers_words(answers, data):
    tokenizer = load_tokenizer(str(STUDENT))
    examples = ExampleSet.open(data, "train", tokenizer, 96, 128)
    rows = read_jsonl(answers / "generated.jsonl")
    assert len(examples) == len(rows) == 34
    for i, row in enumerate(rows):
        whole = tokenizer(row["prompt"] + row["gen_answer"])["input_ids"] + [tokenizer.eos_token_id]
        prompt, response = examples[i].prompt.tolist(), examples[i].response.tolist()
        assert prompt + response == whole[:128]
        assert tokenizer.decode(prompt) == row["prompt"]
    assert examples.references == [[row["gen_answer"]] for row in rows]
    for name in ("valid_0.bin", "valid_0.idx", "valid.jsonl"):
        assert (data / name).read_bytes() == (FULL / name).read_bytes()


def test_answers_to_another_split_or_without_answers_are_refused(answers, tmp_path):
    file = tmp_path / "generated.jsonl"
    row = {"prompt": read_jsonl(FULL / "valid.jsonl")[0]["prompt"], "gen_answer": "x"}
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"line 1: its prompt is not in .*another split"):
        made_pseudo(file, tmp_path / "data")
    with pytest.raises(UserError, match='"gen_answer" are needed'):
        made_pseudo(FULL / "train.jsonl", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def seqkd_argv(data, save, *extra: str) -> list[str]:
    argv = ["--method", "seqkd", "--model-path", str(STUDENT), "--data-dir", str(data), "--save", str(save), *SIZES]
    return [*argv, "--lr", "0.001", "--batch-size", "2", "--dev-num", "4", "--no-eval-gen", *extra]


def test_the_student_learns_the_teachers_words(answers, data, save, monkeypatch):
    """One epoch sees each row once: the loss's targets are the answers' tokens. It neither has nor asks a teacher."""
    targets, hard = [], kd.CrossEntropy

    def watched(tokens, *rest):
        targets.append(tokens)
        return hard(tokens, *rest)

    monkeypatch.setattr(kd, "CrossEntropy", watched)
    trainer = train_here(seqkd_argv(data, save, "--kd-ratio", "0"))
    tokenizer = trainer.method.context.tokenizer
    rows = read_jsonl(answers / "generated.jsonl")
    pairs = TextEncoder(tokenizer).pairs([(row["prompt"], row["gen_answer"]) for row in rows])
    said = [token for pair in pairs for token in pair.within(128)[1].tolist()]
    assert sorted(torch.cat(targets).tolist()) == sorted(said)
    losses = [row["loss"] for row in metrics_of(save)]
    assert len(losses) == 17 and losses[-1] < losses[0]


def test_with_a_ratio_it_is_kd_on_these_targets(data, tmp_path):
    rows = []
    for method in ("seqkd", "kd"):
        argv = seqkd_argv(data, tmp_path / method, "--total-iters", "3", "--teacher-model-path", str(TEACHER))
        train_here([method if word == "seqkd" else word for word in argv])
        rows.append([(row["loss"], row["ds_loss"]) for row in metrics_of(tmp_path / method)])
    assert rows[0] == rows[1]
