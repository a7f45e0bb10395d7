"""Models with different vocabularies: losses, decoding and runs over the shared token ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.decoding import prompts, run, tiny
from helpers.deepspeed_files import zero_file
from helpers.runs import tiny_argv
from helpers.training import GOLDEN, metrics_of, start, train_here

from promptkd import losses
from promptkd.errors import UserError
from promptkd.generation.sampling import Sampling, TeacherMixture
from promptkd.losses import (
    ClippedPolicy,
    CrossEntropy,
    ForwardKL,
    FrozenLogits,
    ReverseKL,
    fused_loss,
    log_probs,
    reference_loss,
)
from promptkd.models.vocabulary import SharedVocabulary, shared_vocabulary
from promptkd.models.wrapper import LMHead

WORDS = {word: i for i, word in enumerate("abcdefgh")}
STUDENT, TEACHER = 21, 24  # rows of the heads


def shared(excluded: tuple[int, ...] = (), rows: int = 19) -> SharedVocabulary:
    return SharedVocabulary(rows, excluded, (STUDENT, TEACHER), TEACHER)


def test_shared_vocabulary_of_equal_models_is_none():
    assert shared_vocabulary((10, 10), 10, WORDS, dict(WORDS)) is None


def test_shared_vocabulary_of_padded_models_is_the_smaller_one():
    vocabulary = shared_vocabulary((12, 10), 10, WORDS, WORDS)
    assert (vocabulary.rows, vocabulary.excluded, len(vocabulary)) == (10, (), 10)
    assert 9 in vocabulary and 10 not in vocabulary


def test_shared_vocabulary_excludes_tokens_of_one_tokenizer():
    vocabulary = shared_vocabulary((12, 12), 12, {**WORDS, "<s>": 9}, {**WORDS, "<pad>": 8, "<far>": 20})
    assert (vocabulary.rows, vocabulary.excluded, len(vocabulary)) == (12, (8, 9), 10)


def test_shared_vocabulary_refuses_an_id_with_two_meanings():
    message = r"2 ids have two meanings, 6 one; 3 is 'd' to the student and 'x' to the teacher, which has 'd' as 9"
    teacher = {**WORDS, "x": 3, "d": 9, "y": 4}
    del teacher["e"]
    with pytest.raises(UserError, match=message):
        shared_vocabulary((12, 12), 12, WORDS, teacher)
    with pytest.raises(UserError, match="which lacks 'a'"):
        shared_vocabulary((12, 12), 12, WORDS, {"z": 0})
    assert shared_vocabulary((12, 3), 3, WORDS, teacher).rows == 3, "ids without a row in both have no meaning there"
    with pytest.raises(UserError, match="share no token"):
        shared_vocabulary((12, 12), 12, {"a": 0}, {"b": 1})


def test_notice_warns_of_responses_that_cannot_end():
    assert "no token that ends an answer" in shared((5,)).notice([5, 20])
    assert "no token that ends" not in shared((5,)).notice([5, 6])


def test_check_inputs_refuses_tokens_without_an_embedding():
    vocabulary = SharedVocabulary(19, (), (30, 24), 24)
    vocabulary.check_inputs([("row 1", [3, 23])])
    with pytest.raises(UserError, match=r"row 2 holds token 24, and the teacher has embeddings for 24 tokens"):
        vocabulary.check_inputs([("row 1", [3, 23]), ("row 2", [24, 1])])


def plain_loss(kind: str, logits, teacher, ids, tokens, parts):
    """Each position's loss from the distributions over `ids`, none of the project's code."""
    q, t = (torch.softmax(z[:, ids].double(), -1) for z in (logits, teacher))
    at = (torch.tensor(ids)[None] == tokens[:, None]).double()
    if kind == "reverse":
        return (q * (q / t).log()).sum(-1)
    if kind == "forward":
        return -(t * q.log()).sum(-1)
    if kind == "policy":
        ratio = (q * at).sum(-1) / parts["old"].double().exp()
        return torch.maximum(-parts["advantages"] * ratio, -parts["advantages"] * ratio.clamp(0.8, 1.2))
    return torch.nn.functional.cross_entropy(logits.double(), tokens, reduction="none")


@pytest.mark.parametrize("excluded", [(), (4, 17)])
@pytest.mark.parametrize("kinds", [["reverse"], ["forward"], ["hard", "forward"], ["policy", "reverse"]])
def test_losses_equal_plain_losses_over_shared_ids(kinds, excluded, monkeypatch):
    monkeypatch.setitem(losses.CHUNK, "cpu", 7 * STUDENT)
    torch.manual_seed(0)
    count, over = 30, shared(excluded)
    ids = [i for i in range(19) if i not in excluded]
    hidden, weight, bias = (torch.randn(*s).requires_grad_() for s in ((count, 8), (STUDENT, 8), (STUDENT,)))
    target = FrozenLogits(torch.randn(count, 5), LMHead(torch.randn(TEACHER, 5), None, over))
    target.head.weight[19:] *= 9  # rows beyond the student's vocabulary would matter
    tokens = torch.tensor(ids)[torch.randint(len(ids), (count,))]
    parts = {"advantages": torch.randn(count), "old": torch.randn(count) * 0.1 - 3}
    policy = ClippedPolicy(tokens, importance=torch.ones(count), clip=0.2, **parts)
    terms = {
        "reverse": ReverseKL(target, 0.7),
        "forward": ForwardKL(target, 0.7),
        "hard": CrossEntropy(tokens, 0.3),
        "policy": policy,
    }
    weights = torch.rand(count) / count
    expected = 0
    for kind in kinds:
        term = plain_loss(kind, hidden @ weight.T + bias, target.hidden @ target.head.weight.T, ids, tokens, parts)
        expected = expected + terms[kind].coefficient * (term * weights).sum()
    wanted = torch.autograd.grad(expected, [hidden, weight, bias])
    for function in (fused_loss, reference_loss):
        loss, _ = function(hidden, LMHead(weight, bias, over), [terms[kind] for kind in kinds], weights)
        assert float(loss) == pytest.approx(float(expected), abs=1e-5)
        for ours, theirs in zip(torch.autograd.grad(loss, [hidden, weight, bias]), wanted):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
            if "hard" not in kinds and ours.size(0) == STUDENT:
                assert not ours[[*excluded, 19, 20]].any(), "other rows have no gradient"


def test_log_probs_are_normalized_over_shared_ids():
    torch.manual_seed(0)
    head, hidden, tokens = LMHead(torch.randn(TEACHER, 5), None, shared((4,))), torch.randn(6, 5), torch.arange(5, 11)
    ids = [i for i in range(19) if i != 4]
    plain = torch.log_softmax((hidden @ head.weight.T)[:, ids], -1)[torch.arange(6), [ids.index(t) for t in tokens]]
    torch.testing.assert_close(log_probs(FrozenLogits(hidden, head), tokens), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_exclude_ids_in_half_precision(dtype):
    torch.manual_seed(0)
    over = shared((4,))
    target = FrozenLogits(torch.randn(6, 5).to(dtype), LMHead(torch.randn(TEACHER, 5).to(dtype), None, over))
    hidden, weight = torch.randn(6, 8, dtype=dtype), torch.randn(STUDENT, 8, dtype=dtype).requires_grad_()
    loss, _ = fused_loss(
        hidden, LMHead(weight, None, over), [ReverseKL(target), ForwardKL(target)], torch.full((6,), 1 / 6)
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(weight.grad).all() and not weight.grad[[4, 19, 20]].any()


def test_decode_samples_from_renormalized_shared_ids():
    """One token for each of many rows, from a mixture of models of two sizes, against the exact probabilities."""
    student, teacher = tiny("gpt2"), tiny("llama")
    teacher.resize_token_embeddings(46, mean_resizing=False)
    with torch.no_grad():
        teacher.lm_head.weight[40:] = 50 * teacher.lm_head.weight[0]  # they would take all of the teacher's mass
    over = SharedVocabulary(38, (7,), (40, 46), 46)
    count, prompt = 4000, prompts()[0]
    drawn = run(
        student, [prompt] * count, max_new_tokens=1, sampling=Sampling(), shared=over,
        teacher_mixture=TeacherMixture(teacher, 0.4), rng_keys=[(3, row) for row in range(count)],
    ).responses  # fmt: skip
    ids = [i for i in range(38) if i != 7]
    with torch.no_grad():
        own, other = (m(torch.as_tensor(prompt)[None]).logits[0, -1, ids].softmax(-1) for m in (student, teacher))
    expected = (0.6 * own + 0.4 * other) * count
    counts = torch.bincount(torch.cat(drawn), minlength=40)
    assert not counts[[7, 38, 39]].any()
    common = expected > 5
    chi = ((counts[ids] - expected)[common].square() / expected[common]).sum()
    assert chi < 2 * common.sum(), chi


def test_decode_accepts_prompts_with_tokens_outside_of_shared_ids():
    guarded = Sampling(do_sample=False, no_repeat_ngram_size=1)
    answer = run(tiny("gpt2"), [[39, 5, 39]], max_new_tokens=8, sampling=guarded, shared=shared(rows=19)).responses[0]
    assert answer.max() < 19 and 5 not in answer.tolist()


def padded(name: str, folder: Path, rows: int = 40, token: str | None = None) -> str:
    """A golden model with rows that would take most of its probability; `token` names one of them in its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = GOLDEN / f"models/{name}"
    model = AutoModelForCausalLM.from_pretrained(source)
    before = model.config.vocab_size
    model.resize_token_embeddings(before + rows, mean_resizing=False)
    with torch.no_grad():
        torch.manual_seed(0)
        model.get_input_embeddings().weight[before:] = 3 * torch.randn(rows, model.config.n_embd)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if token is not None:
        tokenizer.add_tokens([token])  # no special token: texts that spell it have it
    tokenizer.save_pretrained(folder)
    return str(folder)


def numbers(save: Path) -> list[list[float]]:
    """What does not depend on the student's other tokens: all but the cross-entropy on the data."""
    kept, full = ("loss", "norm", "reward", "kl", "lens", "tokens"), ("lm_loss", "pt_loss")
    return [[v for k, v in row.items() if k.endswith(kept) and k not in full] for row in metrics_of(save)]


SHORT = ["--batch-size", "2", "--total-iters", "2", "--max-length", "104", "--no-eval-gen"]
KINDS = {
    "promptkd": ["--exposure-bias-every", "2", "--exposure-bias-rows", "3", "--dev-num", "4"],
    "kd": ["--kd-ratio", "1"],
    "minillm": ["--lm-coef", "0"],
}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name == "promptkd" else pytest.mark.slow) for name in KINDS]
)
def test_train_padded_vocabulary_changes_no_metric(method, tmp_path, capfd):
    """Rows that one model has more, with large logits, and a token of one tokenizer: the run is the run without."""
    more = [*KINDS[method], *SHORT, "--no-do-sample"] if method == "promptkd" else [*KINDS[method], *SHORT]
    train_here(tiny_argv(method, tmp_path / "plain", *more))
    teacher = ["--teacher-model-path", padded("gpt2_teacher", tmp_path / "t", token="<|new|>")]
    student = ["--model-path", padded("gpt2_student", tmp_path / "s", 64)]
    for name, models in {"teacher": teacher, "student": student, "both": teacher + student}.items():
        train_here(tiny_argv(method, tmp_path / name, *more, *models))
        for ours, theirs in zip(numbers(tmp_path / name), numbers(tmp_path / "plain"), strict=True):
            if name == "both":  # the rows 1501 to 1539 are in both, and compared
                break
            assert ours == pytest.approx(theirs, abs=1e-5), name
        curves = [[row["curve"] for row in metrics_of(tmp_path / n, "exposure_bias")] for n in (name, "plain")]
        if name != "both" and method == "promptkd":
            assert curves[0] == [pytest.approx(curve, rel=1e-3, abs=1e-3) for curve in curves[1]] and curves[0]
        sizes = {"teacher": (1500, 1540, 1500), "student": (1564, 1500, 1500), "both": (1564, 1540, 1539)}[name]
        message = (
            f"the student predicts {sizes[0]} tokens, the teacher {sizes[1]}: they are compared over the {sizes[2]} "
        )
        assert capfd.readouterr().err.count(message) == 1
        described = json.loads((tmp_path / name / "config.json").read_text())["vocabulary"]
        assert described == dict(zip(("student", "teacher", "shared"), sizes))


@pytest.mark.slow
def test_train_padded_vocabulary_changes_no_metric_with_zero_3(tmp_path):
    more = [*SHORT, "--no-do-sample", "--deepspeed_config", zero_file(tmp_path, 3)]
    train_here(tiny_argv("promptkd", tmp_path / "plain", *more))
    teacher = ["--teacher-model-path", padded("gpt2_teacher", tmp_path / "t")]
    student = ["--model-path", padded("gpt2_student", tmp_path / "s", 64)]
    for name, models in {"teacher": teacher, "student": student}.items():
        train_here(tiny_argv("promptkd", tmp_path / name, *more, *models))
        for ours, theirs in zip(numbers(tmp_path / name), numbers(tmp_path / "plain"), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_train_padded_vocabulary_changes_no_metric_with_tensor_parallelism(tmp_path):
    """Two ranks hold both models together."""
    more = [*SHORT, "--no-do-sample"]
    train_here(tiny_argv("promptkd", tmp_path / "plain", *more))
    models = ["--teacher-model-path", padded("gpt2_teacher", tmp_path / "t")]
    argv = tiny_argv("promptkd", tmp_path / "parts", *more, *models, "--model-parallel", "--model-parallel-size", "2")
    done = start(argv, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("they are compared over the 1500 that both have, renormalized") == 1
    for ours, theirs in zip(numbers(tmp_path / "parts"), numbers(tmp_path / "plain"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_train_accepts_student_tokens_as_targets_but_not_as_teacher_inputs(tmp_path):
    """Its targets are learned; as the teacher's input it is refused where the teacher has no row for it."""
    student = padded("gpt2_student", tmp_path / "s", 4, token="<|new|>")
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": f"List {i} words.", "input": "", "output": "data <|new|> token"} for i in range(8)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model-path", student, "--data-dir", str(data), "--batch-size", "4", "--total-iters", "2"]
    wide = ["--teacher-model-path", padded("gpt2_teacher", tmp_path / "t", 4)]
    train_here(tiny_argv("kd", tmp_path / "wide", *options, *wide))
    assert all(row["lm_loss"] > 0 and row["ds_loss"] > 0 for row in metrics_of(tmp_path / "wide"))
    message = r"example 1 of the training data holds token 1500, and the teacher has embeddings for 1500 tokens"
    with pytest.raises(UserError, match=message):
        train_here(tiny_argv("kd", tmp_path / "narrow", *options))
    with pytest.raises(UserError, match=r"--prompt-init-text .*has token 1500"):
        more = ["--data-dir", str(GOLDEN / "processed/dolly/full/gpt2"), "--prompt-init-text", "<|new|>"]
        train_here(tiny_argv("promptkd", tmp_path / "text", *options, *more))
    assert not (tmp_path / "narrow").exists() and not (tmp_path / "text").exists()


def test_exposure_bias_is_unchanged_by_a_padded_vocabulary(tmp_path, capfd):
    from evaluate import read_settings
    from promptkd.evaluation.exposure_bias import run as measure

    teacher = padded("gpt2_teacher", tmp_path / "t", token="<|new|>")
    curves = []
    for name, path in {"plain": str(GOLDEN / "models/gpt2_teacher"), "padded": teacher}.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        shutil.copyfile(GOLDEN / "processed/dolly/full/gpt2/valid.jsonl", tmp_path / "data/valid.jsonl")
        options = ["--type", "exposure_bias", "--model-path", str(GOLDEN / "models/gpt2_student"), "--dev-num", "4"]
        options += ["--teacher-model-path", path, "--data-dir", str(tmp_path / "data"), "--data-names", "dolly"]
        options += ["--max-length", "104", "--max-prompt-length", "96", "--save", str(tmp_path / name)]
        measure(read_settings(options))
        curves.append(json.loads((tmp_path / name / "exposure_bias.json").read_text()))
    assert curves[0]["ex_acc_err"] == pytest.approx(curves[1]["ex_acc_err"], rel=1e-4)
    assert "protocol" in curves[1] and curves[1]["protocol"]["shared_tokens"] == 1500
    assert "compared over the 1500" in capfd.readouterr().err
