"""Exposure bias against a slow and plain computation of its definition; evaluate.py from end to end; in training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.decoding import tiny
from helpers.stand_in_ranks import OneOf
from helpers.training import GOLDEN
from transformers import AutoModelForCausalLM

from evaluate import read_settings
from promptkd.errors import exit_with
from promptkd.evaluation.exposure_bias import Protocol, accumulated_errors, curves, run
from promptkd.generation.sampling import Sampling, uniform_draws
from promptkd.models.soft_prompt import SoftPrompt, save_prompt
from promptkd.models.wrapper import LanguageModel

EOS, LIMIT, PROMPT_LIMIT, SAMPLES = 3, 12, 10, 2
GREEDY = Protocol(LIMIT, [EOS], Sampling(do_sample=False), samples=1, seed=5, token_budget=200, forward_budget=100)


def prompts() -> list[np.ndarray]:
    """Six of different lengths; one holds end-of-text, one is nothing else, one fills the limit."""
    rng = np.random.default_rng(3)
    made = [rng.integers(4, 40, size=size) for size in (1, 4, PROMPT_LIMIT, 6, 3, 1)]
    made[3][[1, 4]] = made[5][0] = EOS
    return made


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request):
    """Student and teacher that differ, and say end-of-text often enough."""
    student = tiny(request.param)
    torch.manual_seed(9)
    teacher = type(student)(student.config).eval()
    with torch.no_grad():
        for model in (student, teacher):  # a tied head has no bias: lengthen end-of-text's own row
            model.get_output_embeddings().weight[EOS] *= 1.6
    return student, teacher


def forward(model, ids: torch.Tensor, mask: torch.Tensor, soft: torch.Tensor | None) -> torch.Tensor:
    """Logits of one row at the places of `ids`; the soft prompt before everything, padding too."""
    embedded = model.get_input_embeddings()(ids[None])
    ahead = 0 if soft is None else len(soft)
    if ahead:
        embedded = torch.cat([soft[None], embedded], dim=1)
        mask = torch.cat([torch.ones(ahead, dtype=mask.dtype), mask])
    positions = (mask.cumsum(0) - 1).clamp(min=0)
    return model(inputs_embeds=embedded, attention_mask=mask[None], position_ids=positions[None]).logits[0, ahead:]


def write(model, prompt: np.ndarray, soft, uniform: np.ndarray | None) -> list[int]:
    """An answer, token by token: the likeliest one, or the first whose cumulative probability exceeds the number."""
    ids = prompt.tolist()
    for place in range(LIMIT):
        logits = forward(model, torch.tensor(ids), torch.ones(len(ids), dtype=torch.long), soft)[-1]
        token = int(logits.argmax())
        if uniform is not None:
            token = int((logits.softmax(0).double().cumsum(0) > uniform[place]).nonzero()[0])
        ids.append(token)
        if token == EOS:
            break
    return ids[len(prompt) :]


def kl(teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> torch.Tensor:
    teacher, student = (torch.distributions.Categorical(logits=z) for z in (teacher_logits, student_logits))
    return torch.distributions.kl_divergence(teacher, student)


def plain_errors(student, teacher, prompt, response, soft) -> tuple[torch.Tensor, torch.Tensor]:
    """Error and mask for each position: those of the states that predict the response's tokens."""
    ids = torch.tensor([*prompt, *response])
    ones = torch.ones(len(ids), dtype=torch.long)
    error = kl(forward(teacher, ids, ones, soft), forward(student, ids, ones, None))
    errors, mask = torch.zeros(LIMIT), torch.zeros(LIMIT)
    for place in range(len(response)):
        errors[place], mask[place] = error[len(prompt) - 1 + place], 1
    return errors, mask


def published_errors(student, teacher, prompt, response, soft) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in the issue's words on the published arithmetic."""
    row = torch.full((PROMPT_LIMIT + LIMIT,), EOS)
    row[PROMPT_LIMIT - len(prompt) : PROMPT_LIMIT] = torch.as_tensor(prompt)
    row[PROMPT_LIMIT : PROMPT_LIMIT + len(response)] = torch.tensor(response)
    mask = (row != EOS).long()
    error = kl(forward(teacher, row, mask, soft), forward(student, row, mask, None))
    return error[PROMPT_LIMIT:] * mask[PROMPT_LIMIT:], mask[PROMPT_LIMIT:].float()


@torch.no_grad()
def plain(student, teacher, soft, how: Protocol) -> np.ndarray:
    """R and eps, [2, rows, positions]."""
    found = []
    for model, prefix in ((student, None), (teacher, soft)):
        for row, prompt in enumerate(prompts()):
            errors, alive = torch.zeros(LIMIT), torch.zeros(LIMIT)
            for sample in range(how.samples):
                uniform = uniform_draws(how.seed, row, sample, count=LIMIT) if how.sampling.do_sample else None
                response = write(model, prompt, prefix, uniform)
                measure = published_errors if how.published else plain_errors
                for total, part in zip((errors, alive), measure(student, teacher, prompt, response, soft)):
                    total += part
            means = errors / (alive + 0.001) if how.published else errors / alive.clamp(min=1)
            found.append(means.cumsum(0).numpy())
    return np.array(found).reshape(2, len(prompts()), LIMIT)


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_accumulated_errors_equal_the_plain_computation(pair, sampled, published, prompted):
    student, teacher = pair
    how = replace(GREEDY, published=published)
    if sampled:
        how = replace(how, sampling=Sampling(), samples=SAMPLES)
    soft = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)) if prompted else None
    seen = LanguageModel(teacher, SoftPrompt(soft) if prompted else None)
    ours = accumulated_errors(LanguageModel(student), seen, prompts(), how, OneOf())
    expected = plain(student, teacher, soft, how)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-5)
    lasting = (np.diff(expected, axis=-1) != 0).sum(-1)
    assert lasting.min() < lasting.max(), "answers of one length only would prove little"
    values = curves(ours, 5)
    R, eps = expected
    assert values["mean_R"] == pytest.approx(R.mean(0), rel=1e-4)
    assert values["std_eps"] == pytest.approx(eps.std(0, ddof=1), rel=1e-4, abs=1e-5)
    assert values["ex_acc_err"] == pytest.approx((R.mean(0) - eps.mean(0)) / eps.mean(0) * 100, rel=1e-3, abs=0.01)


def test_published_answers_end_only_at_end_of_text(pair):
    """The published code knows no other end, such as a chat template's."""
    models = [LanguageModel(model) for model in pair]
    also = write(pair[0], prompts()[2], None, None)[1]
    for published in (True, False):
        errors = [
            accumulated_errors(*models, prompts(), replace(GREEDY, end_ids=ends, published=published), OneOf())
            for ends in ([EOS], [EOS, also])
        ]
        assert torch.equal(*errors) is published


def test_accumulated_errors_do_not_depend_on_ranks_and_budget():
    student, teacher = (LanguageModel(tiny("gpt2")) for _ in range(2))
    with torch.no_grad():
        teacher.model.transformer.wte.weight.mul_(1.1)
    how = replace(GREEDY, sampling=Sampling(), samples=SAMPLES)
    whole = accumulated_errors(student, teacher, prompts(), how, OneOf())
    first = OneOf(0, 2)
    accumulated_errors(student, teacher, prompts(), how, first)
    second = OneOf(1, 2, before=first.seen)
    both = accumulated_errors(student, teacher, prompts(), replace(how, token_budget=30, forward_budget=20), second)
    torch.testing.assert_close(both, whole, rtol=1e-6, atol=1e-6)
    assert all(bool(seen.any()) for seen in (first.seen[0], second.seen[0]))


def test_curves_of_a_student_that_is_its_teacher_have_no_percentage():
    model = LanguageModel(tiny("gpt2"))
    errors = accumulated_errors(model, model, prompts(), replace(GREEDY, sampling=Sampling()), OneOf())
    assert float(errors.abs().max()) < 1e-6
    assert set(curves(torch.zeros_like(errors), 0)["ex_acc_err"]) == {None}


def test_curves_interval_resamples_rows():
    rng = np.random.default_rng(0)
    eps = rng.uniform(1, 3, (40, 1))
    errors = torch.from_numpy(np.stack([eps * 1.5 + rng.normal(0, 0.2, (40, 1)), eps]))
    values = curves(errors, 7)
    drawn = rng.integers(0, 40, (4000, 40))
    R, eps = (part[drawn, 0].mean(1) for part in errors.numpy())
    low, high = np.percentile((R / eps - 1) * 100, [2.5, 97.5])
    assert values["ex_acc_err_low"][0] == pytest.approx(low, abs=0.3)
    assert values["ex_acc_err_high"][0] == pytest.approx(high, abs=0.3)
    assert curves(errors, 7) == values
    alone = curves(errors[:, :1], 7)
    assert alone["ex_acc_err_low"] == alone["ex_acc_err_high"] == alone["ex_acc_err"] and alone["std_R"] == [None]


# evaluate.py


def options(save: Path, *extra: str) -> list[str]:
    models = ["--model-path", str(GOLDEN / "models/gpt2_student")]
    models += ["--teacher-model-path", str(GOLDEN / "models/gpt2_teacher")]
    data = ["--data-dir", str(GOLDEN / "processed/dolly/prompt/gpt2"), "--data-names", "dolly"]
    sizes = ["--max-length", "104", "--max-prompt-length", "96", "--no-do-sample", "--no-repeat-ngram-size", "0"]
    return ["--type", "exposure_bias", *models, *data, *sizes, "--save", str(save), *extra]


def measured(argv: list[str]) -> dict:
    settings = read_settings(argv)
    run(settings)
    return json.loads((Path(settings.evaluation.save) / "exposure_bias.json").read_text())


def test_exposure_bias_writes_results_curves_and_picture(tmp_path, capsys):
    plainly = measured(options(tmp_path / "plain", "--sample-times", "1", "--eval-batch-size", "4"))
    lists = ("ex_acc_err", "ex_acc_err_low", "ex_acc_err_high", "mean_R", "mean_eps", "std_R", "std_eps")
    assert all(len(plainly[name]) == 8 and None not in plainly[name] for name in lists)
    assert plainly["rows"] == 8 and plainly["protocol"]["sample_times"] == 1
    assert plainly["mean_R"][0] == pytest.approx(plainly["mean_eps"][0]), "both begin at the prompt's end"
    assert all(low <= x <= high for low, x, high in zip(*(plainly[k] for k in (lists[1], lists[0], lists[2]))))
    table = (tmp_path / "plain/results.md").read_text()
    assert table in capsys.readouterr().out and f"| {plainly['ex_acc_err'][-1]:.2f} |" in table
    assert (tmp_path / "plain/exposure_bias.png").read_bytes().startswith(b"\x89PNG")

    published = measured(options(tmp_path / "published", "--published"))
    assert published["protocol"]["published"] and published["mean_R"][0] != pytest.approx(published["mean_eps"][0])

    teacher = AutoModelForCausalLM.from_pretrained(GOLDEN / "models/gpt2_teacher")
    soft = teacher.get_input_embeddings().weight[[7, 8, 9]].detach() * 3
    save_prompt(soft, tmp_path / "prompt", "teacher", teacher.config)
    prompted = measured(options(tmp_path / "prompted", "--teacher-prompt", str(tmp_path / "prompt")))
    assert prompted["teacher"]["prompt"] and prompted["mean_eps"] != pytest.approx(plainly["mean_eps"])


def test_exposure_bias_of_several_sets_writes_a_folder_each(tmp_path, capsys):
    valid = (GOLDEN / "processed/dolly/prompt/gpt2/valid.jsonl").read_text().splitlines(keepends=True)
    for name, rows in (("dolly", valid[:2]), ("own", valid[2:5])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "valid.jsonl").write_text("".join(rows))
    names = ["--data-dir", str(tmp_path), "--data-names", "dolly", "own", "vicuna"]
    argv = options(tmp_path / "out", *names)
    run(read_settings(argv))
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {name: entry["rows"] for name, entry in results["sets"].items()} == {"dolly": 2, "own": 3}
    assert "| vicuna | missing |" in (tmp_path / "out/results.md").read_text()
    for name in ("dolly", "own"):
        curve = json.loads((tmp_path / "out" / name / "exposure_bias.json").read_text())
        assert curve["set"] == name and curve["ex_acc_err"][-1] == results["sets"][name]["ex_acc_err"]
    capsys.readouterr()
    assert "--overwrite" in refused(argv, capsys)
    run(read_settings(options(tmp_path / "out", "--overwrite")))
    assert not (tmp_path / "out/own/exposure_bias.json").exists()


def refused(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: run(read_settings(argv)))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "extra, says",
    [
        (["--type", "eval_main"], "--teacher-model-path is for --type exposure_bias"),
        (["--teacher-model-path", ""], "needs --teacher-model-path"),
        (["--teacher-model-path", "/nowhere/model"], "--teacher-model-path /nowhere/model"),
        (["--sample-times", "0"], "--sample-times 0"),
        (["--sample-times", "2"], "--no-do-sample"),
        (["--do-sample", "--seeds", "1", "2"], "--sample-times draws"),
        (["--published", "--prompt-cut", "start"], "--prompt-cut"),
        (["--teacher-prompt", "/nowhere"], "no readable soft prompt"),
        (["--max-length", "4096"], "--max-length"),
        (["--data-names", "../own"], "--data-names ../own"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, extra, says):
    assert says in refused(options(tmp_path / "out", *extra), capsys)
    assert not (tmp_path / "out").exists()
