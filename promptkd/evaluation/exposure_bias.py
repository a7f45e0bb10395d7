"""Exposure bias: the student's error on its own answers, compared with its error on the teacher's answers.

At a state (a prompt and the first tokens of a response) the student's error is KL(teacher || student). Accumulated
over the response's positions it is R on the student's answers and eps on the teacher's. The excess accumulated error
is (R - eps) / eps in percent (Arora et al., 2022; PromptKD, section 5).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promptkd.config.options import TOKEN_BUDGET
from promptkd.data.batching import group_by_length, make_micro_batches
from promptkd.distributed.ranks import Ranks
from promptkd.errors import UserError
from promptkd.evaluation.exposure_files import draw, markdown
from promptkd.evaluation.session import Session, describe_model, open_evaluation
from promptkd.generation.answers import share
from promptkd.generation.budget import decoding_budget
from promptkd.generation.decode import GenerationRequest, decode
from promptkd.generation.sampling import Sampling
from promptkd.losses import FrozenLogits, kl_divergences
from promptkd.models.loading import (
    check_pair,
    end_ids,
    load_tokenizer,
)
from promptkd.models.wrapper import LanguageModel
from promptkd.utils.files import write_json
from promptkd.utils.progress import Progress

RESAMPLES = 1000  # bootstrap samples of the rows for the interval
INTERVAL = (2.5, 97.5)  # percentiles of the interval
FILE = "exposure_bias.json"


@dataclass(frozen=True)
class Protocol:
    """How answers are drawn and compared.

    Attributes:
        max_new_tokens: Maximum number of tokens in an answer.
        end_ids: Tokens that end an answer, end-of-text first. The published arithmetic uses only that one.
        sampling: How the next token is chosen.
        samples: Answers to each prompt from each of the two models.
        seed: The seed of sampling.
        token_budget: Padded tokens of prompts and answers in a batch that is decoded.
        forward_budget: The same of a forward pass over answers.
        published: Whether to reproduce the published code's arithmetic.
    """

    max_new_tokens: int
    end_ids: Sequence[int]
    sampling: Sampling
    samples: int
    seed: int
    token_budget: int
    forward_budget: int
    published: bool = False

    def request(
        self, prompts: Sequence[np.ndarray], rng_keys: Sequence[tuple[int, int]], writer: LanguageModel
    ) -> GenerationRequest:
        """Return the request for answers of a model. `rng_keys` are the index of the prompt and of the sample."""
        return GenerationRequest(
            prompts,
            self.max_new_tokens,
            self.end_ids[:1] if self.published else self.end_ids,
            self.sampling,
            rng_keys=[(self.seed, *key) for key in rng_keys],
            prefix=None if writer.prompt is None else writer.prompt.embeddings,
            shared=writer.shared,
        )


@torch.no_grad()
def accumulated_errors(
    student: LanguageModel,
    teacher: LanguageModel,
    prompts: Sequence[np.ndarray],
    protocol: Protocol,
    ranks: Ranks,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Return R and eps of each prompt up to each position.

    At each position the errors of the samples that reach it are averaged. Where none does, nothing is added. Student
    and teacher draw with the same random numbers, and no generator's state changes. Except for rounding, nothing
    depends on ranks or token budgets.

    Args:
        student: The student, in eval mode with complete weights.
        teacher: The teacher, likewise.
        prompts: Token ids of each prompt.
        protocol: How answers are drawn and compared.
        ranks: The ranks that share the work.
        progress: Called with the number of answers of this rank that have just finished.

    Returns:
        float64 `(2, prompts, max_new_tokens)` on the CPU, the same on all ranks.
    """
    sums = torch.zeros(2, len(prompts), protocol.max_new_tokens, dtype=torch.float64, device=ranks.device)
    alive = torch.zeros_like(sums)
    pairs = share(prompts, protocol.samples, ranks)
    lengths = [len(prompts[row]) + protocol.max_new_tokens for _, row in pairs]
    for group in group_by_length(lengths, protocol.token_budget):
        batch = [pairs[place] for place in group]
        batch_prompts = [prompts[row] for _, row in batch]
        for source, writer in enumerate((student, teacher)):
            request = protocol.request(batch_prompts, [(row, sample) for sample, row in batch], writer)
            responses = decode(
                writer.model, request, protocol.token_budget, progress=progress, broadcast=ranks.broadcast_tp
            ).responses
            states: tuple[Sequence[Any], Sequence[Any]] = (batch_prompts, responses)
            if protocol.published:
                states = published_states(batch_prompts, responses, protocol.end_ids[0])
            for (_, row), errors in zip(batch, state_errors(student, teacher, *states, protocol.forward_budget)):
                sums[source, row, : len(errors)] += errors
                alive[source, row, : len(errors)] += 1
    sums, alive = ranks.all_reduce_sum(sums), ranks.all_reduce_sum(alive)
    means = sums / (alive + 1e-3) if protocol.published else sums / alive.clamp(min=1)
    return means.cpu().cumsum(-1)  # CUDA has no deterministic cumsum of floats


def state_errors(
    student: LanguageModel,
    teacher: LanguageModel,
    prompts: Sequence[Any],
    responses: Sequence[Any],
    token_budget: int,
) -> list[Tensor]:
    """Return KL(teacher || student) at the states that predict each response's tokens, float64 `(length,)` each."""
    errors: list[Tensor] = [torch.empty(0)] * len(responses)
    rows = [row for row, response in enumerate(responses) if len(response)]
    prompts, responses = ([tokens[row] for row in rows] for tokens in (prompts, responses))
    for batch in make_micro_batches(
        prompts, responses, [1.0] * len(rows), token_budget, student.lm_head().weight.device
    ):
        logits = (FrozenLogits(model.hidden_states(batch), model.lm_head()) for model in (teacher, student))
        parts = kl_divergences(*logits).double().split([len(responses[i]) for i in batch.members])
        for i, part in zip(batch.members, parts):
            errors[rows[i]] = part
    return errors


def published_states(
    prompts: Sequence[np.ndarray], responses: Sequence[Tensor], eos_id: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return prompts and responses with which `state_errors` reads the published code's states.

    That code masks every end-of-text token, also in prompts. No token attends to it and it takes no position, so it
    is left out here. The code also reads one state too late: the first follows the first response token, the last
    follows the last token before end-of-text. What the last state predicts is not used.
    """
    kept = [
        (prompt[prompt != eos_id], response[response != eos_id].numpy()) for prompt, response in zip(prompts, responses)
    ]
    fronts = [np.concatenate([prompt, response[:1]]) for prompt, response in kept]
    rests = [np.append(response[1:], eos_id)[: len(response)] for _, response in kept]
    return fronts, rests


def curves(errors: Tensor, seed: int) -> dict[str, list[float | None]]:
    """Return for each position the mean and deviation of R and eps over rows, and ex_acc_err in percent.

    Deviations are unbiased, and None for a single row. The 95 % interval of ex_acc_err resamples rows, R and eps
    together. It is None where eps is 0.

    Args:
        errors: See `accumulated_errors`.
        seed: The seed of resampling.
    """
    students, teachers = errors.numpy()
    rows = len(students)
    weights = np.random.Generator(np.random.Philox(seed)).multinomial(rows, [1 / rows] * rows, size=RESAMPLES) / rows
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.percentile(_excess(weights @ students, weights @ teachers), INTERVAL, axis=0)
        values = {
            "ex_acc_err": _excess(students.mean(0), teachers.mean(0)),
            "ex_acc_err_low": low,
            "ex_acc_err_high": high,
            "mean_R": students.mean(0),
            "mean_eps": teachers.mean(0),
            "std_R": students.std(0, ddof=1) if rows > 1 else students[0] * np.nan,
            "std_eps": teachers.std(0, ddof=1) if rows > 1 else teachers[0] * np.nan,
        }
    return {name: [float(x) if np.isfinite(x) else None for x in array] for name, array in values.items()}


def _excess(students: np.ndarray, teachers: np.ndarray) -> np.ndarray:
    return (students - teachers) / teachers * 100


def run(settings: SimpleNamespace) -> None:
    """Measure one student against one teacher on all sets. Write and print the curves and the table."""
    options, data, bias = settings.evaluation, settings.data, settings.exposure_bias
    check_settings(settings)
    session = open_evaluation(
        settings, {"--model-path": options.model_path, "--teacher-model-path": bias.teacher_model_path}
    )
    student, teacher = load_pair(session)
    ranks = session.ranks
    budgets = [decoding_budget([each.model], data.max_length, ranks, data.token_budget) for each in (student, teacher)]
    data.token_budget = min(budgets)
    protocol = Protocol(
        max_new_tokens=data.max_length - data.max_prompt_length,
        end_ids=end_ids(session.tokenizer, student.model, teacher.model),
        sampling=Sampling(**dataclasses.asdict(settings.decoding)),
        samples=bias.sample_times or (3 if settings.decoding.do_sample else 1),
        seed=options.seed,
        token_budget=data.token_budget,
        forward_budget=min(data.token_budget, TOKEN_BUDGET[ranks.device.type]),
        published=bias.published,
    )
    results = session.begin()
    results["protocol"] |= {"sample_times": protocol.samples, "published": bias.published}
    if (shared := student.shared) is not None:
        session.print_notes([f"note: {shared.notice(protocol.end_ids)}"])
        results["protocol"]["shared_tokens"] = len(shared)
    results["teacher"] = describe_model(bias.teacher_model_path) | {"prompt": bias.teacher_prompt}
    measure_sets(session, student, teacher, protocol, results)
    session.finish(results, markdown(results))


def check_settings(settings: SimpleNamespace) -> None:
    """Raise UserError for options that contradict each other."""
    options, bias = settings.evaluation, settings.exposure_bias
    if not bias.teacher_model_path:
        raise UserError("--type exposure_bias needs --teacher-model-path: name the teacher's folder")
    if options.prompt is not None:
        raise UserError("--type exposure_bias takes --teacher-prompt: leave --prompt out")
    if options.rouge_tokenizer != "unicode":
        raise UserError("--type exposure_bias computes no ROUGE-L: leave --rouge-tokenizer out")
    if len(options.seeds) > 1:
        raise UserError("--type exposure_bias takes one seed: --sample-times draws several answers with it")
    if not settings.decoding.do_sample and (bias.sample_times or 1) > 1:
        raise UserError("--no-do-sample gives the same answer each time: leave --sample-times out")
    if bias.published and settings.data.prompt_cut == "start":
        raise UserError("--published keeps the first tokens of prompts: leave --prompt-cut out")


def load_pair(session: Session) -> tuple[LanguageModel, LanguageModel]:
    """Load student and teacher with their soft prompts, and check that they fit each other."""
    settings = session.settings
    bias = settings.exposure_bias
    student = session.load("--model-path", settings.evaluation.model_type)
    teacher = session.load("--teacher-model-path")
    shared = check_pair(student, teacher, session.tokenizer, load_tokenizer(bias.teacher_model_path))
    if shared is not None:
        for each in session.sets:
            for kind, rows in (("prompt", each.prompts), ("response", each.responses)):
                shared.check_inputs((f"{each.path}: {kind} {i + 1}", ids) for i, ids in enumerate(rows))
    own_prompt = session.load_prompt(settings.evaluation.prompt, student, "--model-path")
    prompt = session.load_prompt(bias.teacher_prompt, teacher, "--teacher-model-path")
    device = session.ranks.device
    return LanguageModel(student, own_prompt, shared).to(device), LanguageModel(teacher, prompt, shared).to(device)


def measure_sets(
    session: Session, student: LanguageModel, teacher: LanguageModel, protocol: Protocol, results: dict[str, Any]
) -> None:
    """Fill in `results["sets"]`. Write each set's curves, to a folder of its own if there are several sets."""
    ranks, folder = session.ranks, Path(session.settings.evaluation.save)
    count = sum(len(share(each.prompts, protocol.samples, ranks)) for each in session.sets)
    bar = Progress("", 2 * count, ranks.is_main, unit="answer")
    for each in session.sets:
        began = time.perf_counter()
        bar.start(each.name)
        errors = accumulated_errors(student, teacher, each.prompts, protocol, ranks, bar.update)
        values, record = curves(errors, protocol.seed), each.record()
        last = {name: curve[-1] for name, curve in values.items()}
        results["sets"][each.name] = record | last | {"seconds": round(time.perf_counter() - began, 3)}
        if ranks.is_main:
            place = folder if len(session.sets) == 1 else folder / each.name
            place.mkdir(exist_ok=True)
            same = {key: results[key] for key in ("type", "model", "teacher", "protocol", "seeds")}
            write_json(place / FILE, {**values, "set": each.name, **record, **same})
            draw(values, place / "exposure_bias.png", f"{results['model']['path']} on {each.name}")
    bar.close()
