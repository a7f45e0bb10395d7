"""MiniLLM on answers of unequal lengths, against its definitions computed plainly (tests/golden/README.md).

All answers of the recording fill the limit, so it cannot tell how padding counts. Here every answer is one row of
the definitions' padded arrays, written token by token, one sequence at a time.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.minillm_data import PROMPTS
from helpers.plain_promptkd import logits_of, reverse_kl
from helpers.training import GOLDEN, metrics_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from promptkd.generation.sampling import uniform_draws
from promptkd.training.setup import build_trainer
from train import resolve

EOS, LIMIT, STEPS, LR = 0, 10, 4, 2e-3
ALPHA, GAMMA, SCALING, CLIP_REWARD, CLIP = 0.3, 0.9, 0.5, 3.0, 0.05


def make_models(folder: Path, sampled: bool) -> Path:
    """The golden pair, made to say end-of-text now and then: a tied head has no bias, so its row is lengthened."""
    for name in ("student", "teacher"):
        shutil.copytree(GOLDEN / f"models/gpt2_{name}", folder / name, copy_function=shutil.copyfile)
        weights = load_file(folder / name / "model.safetensors")
        weights["transformer.wte.weight"][EOS] *= 5.0 if sampled else 2.0
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def options(models, save, sampled: bool, *extra: str) -> list[str]:
    argv = ["--method", "minillm", "--model-path", f"{models}/student", "--teacher-model-path", f"{models}/teacher"]
    argv += ["--prompt-data-dir", str(PROMPTS), "--max-length", str(96 + LIMIT), "--max-prompt-length", "96"]
    argv += ["--dev-num", "0", "--save", str(save), "--lr", str(LR), "--total-iters", str(STEPS)]
    argv += ["--num-rollouts", "8", "--chunk-size", "4", "--ppo-epochs", "1", "--clip-grad", "1.0"]
    argv += ["--teacher-mixed-alpha", str(ALPHA), "--gamma", str(GAMMA), "--reward-scaling", str(SCALING)]
    argv += ["--cliprange-reward", str(CLIP_REWARD), "--cliprange", str(CLIP)]
    return [*argv, *([] if sampled else ["--no-do-sample"]), *extra]


@dataclass
class Row:
    """One rollout; tensors [LIMIT], zeros behind the answer's end."""

    prompt: list[int]
    answer: list[int]
    mask: Tensor
    log_q: Tensor
    rewards: Tensor
    w: Tensor
    rev_kl: float
    own_length: int


def write(student, teacher, prompt: list[int], uniform, share: float) -> list[int]:
    """An answer, token by token: the likeliest, or drawn from the mixture by its number."""
    answer: list[int] = []
    while len(answer) < LIMIT and EOS not in answer:
        logits = [model(torch.tensor([prompt + answer])).logits[0, -1] for model in (student, teacher)]
        mine, theirs = (each.softmax(0).double() for each in logits)
        chances = ((1 - share) * mine + share * theirs).cumsum(0)
        token = logits[0].argmax() if uniform is None else (chances > uniform[len(answer)]).nonzero()[0]
        answer.append(int(token))
    return answer


def padded(values: Tensor) -> Tensor:
    return torch.cat([values, values.new_zeros(LIMIT - len(values))])


def chosen(model, prompt: list[int], answer: list[int]) -> Tensor:
    """log p(y_t), [LIMIT], 0 on padding."""
    log_p = logits_of(model, prompt, answer).log_softmax(-1)
    return padded(torch.stack([row[token] for row, token in zip(log_p, answer)]))


@torch.no_grad()
def collect(student, teacher, prompt: list[int], key: tuple[int, int], sampled: bool) -> Row:
    noise = [uniform_draws(10, *key, n, count=LIMIT) if sampled else None for n in (0, 1)]
    answer = write(student, teacher, prompt, noise[0], ALPHA)
    own = write(student, teacher, prompt, noise[1], 0.0)
    log_q, log_p = (chosen(model, prompt, answer) for model in (student, teacher))
    mask = padded(torch.ones(len(answer)))
    rewards = ((log_p - log_q) / SCALING).clamp(-CLIP_REWARD, CLIP_REWARD)
    w = log_q.exp() / ((1 - ALPHA) * log_q.exp() + ALPHA * log_p.exp())
    difference = chosen(teacher, prompt, own) - chosen(student, prompt, own)
    rev_kl = float((difference.exp() - 1 - difference).sum())  # a padded 0 adds 0
    return Row(prompt, answer, mask, log_q, rewards, w, rev_kl, len(own))


def advantages_of(row: Row) -> Tensor:
    values = torch.zeros(LIMIT)
    for t in range(len(row.answer)):
        future = sum(GAMMA ** (k - t) * float(row.rewards[k]) for k in range(t, LIMIT))
        values[t] = future / (len(row.answer) - t)
    return values


def whitened(rows: list[Row], published: bool) -> Tensor:
    """[rows, LIMIT]; published: mean and variance over padding, too."""
    values, mask = torch.stack([advantages_of(row) for row in rows]), torch.stack([row.mask for row in rows])
    counted = values.flatten() if published else values[mask.bool()]
    return (values - counted.mean()) / (counted.var(unbiased=False) + 1e-8).sqrt()


def losses(student, teacher, rows: list[Row], published: bool) -> tuple[Tensor, Tensor]:
    """pg_loss and reg_loss of rows that are whitened and averaged together."""
    pg, reg, count = torch.zeros(()), torch.zeros(()), sum(len(row.answer) for row in rows)
    for row, advantages in zip(rows, whitened(rows, published)):
        ratio = (chosen(student, row.prompt, row.answer) - row.log_q).exp() * row.w
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        pg += (torch.maximum(-advantages * ratio, -advantages * clipped) * row.mask).sum() / count
        with torch.no_grad():
            theirs = logits_of(teacher, row.prompt, row.answer)
        reg += reverse_kl(logits_of(student, row.prompt, row.answer), theirs).sum() / count
    return pg, reg


def logged(rows: list[Row], pg: float, reg: float) -> dict[str, float]:
    rewards = [sum(GAMMA**t * float(r) for t, r in enumerate(row.rewards)) / len(row.answer) for row in rows]
    of_rows = {
        "reward": rewards,
        "rev_kl": [row.rev_kl / row.own_length for row in rows],
        "stu_lens": [row.own_length for row in rows],
        "mixed_lens": [len(row.answer) for row in rows],
    }
    means = {name: sum(values) / len(rows) for name, values in of_rows.items()}
    return {"tot_loss": pg + reg, "rl_loss": pg + reg, "pg_loss": pg, "reg_loss": reg, **means}


def plain(models, context: SimpleNamespace, sampled: bool, whiten: str, each_alone: bool) -> list[dict[str, float]]:
    """The metrics of every step. each_alone: micro-batches are whitened and averaged by themselves, as published."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(models / name).eval() for name in ("student", "teacher"))
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=1e-6)
    collections: dict[int, list[Row]] = {}
    steps, seen = [], []
    for step in range(1, STEPS + 1):
        groups = []
        for number, places in context.sampler.batches(step):
            if number not in collections:
                prompts = [context.data.train[row].prompt.tolist() for row in context.sampler.collection(number)]
                collections[number] = [
                    collect(student, teacher, prompt, (number, place), sampled) for place, prompt in enumerate(prompts)
                ]
            groups.append([collections[number][place] for place in places])
        rows = [row for group in groups for row in group]
        seen += rows
        together = groups if each_alone else [rows]
        parts = [losses(student, teacher, group, whiten == "published") for group in together]
        pg, reg = (sum(values) / len(together) for values in zip(*parts))
        steps.append(logged(rows, pg.item(), reg.item()))
        optimizer.zero_grad()
        (pg + reg).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    lengths = {len(row.answer) for row in seen}
    assert len(lengths) > 2 and LIMIT in lengths, "answers of one length would prove nothing"
    assert any(float(row.rewards.abs().max()) == CLIP_REWARD for row in seen), "no reward was clipped"
    return steps


@pytest.mark.parametrize(
    ("sampled", "whiten", "extra"),
    [
        (True, "response", []),
        pytest.param(False, "published", ["--loss-normalization", "micro-batch"], marks=pytest.mark.slow),
        (True, "published", ["--loss-normalization", "micro-batch"]),
    ],
)
def test_every_step_equals_the_definitions(sampled, whiten, extra, tmp_path, save):
    models = make_models(tmp_path / "models", sampled)
    shape = ["--batch-size", "2", "--gradient-accumulation-steps", "2", "--whiten", whiten, *extra]
    trainer = build_trainer(resolve(options(models, save, sampled, *shape)))
    trainer.fit()
    expected = plain(models, trainer.method.context, sampled, whiten, each_alone=bool(extra))
    for row, values in zip(metrics_of(save), expected, strict=True):
        assert {name: row[name] for name in values} == pytest.approx(values, abs=1e-5), row["step"]
