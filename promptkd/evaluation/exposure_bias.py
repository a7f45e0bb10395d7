"""Exposure bias: how much more a student errs on what it wrote itself than on what the teacher wrote.

At a state (a prompt and the first response tokens) the student's error is KL(teacher || student). Accumulated over
the response's positions it is R on the student's own answers and eps on the teacher's; the excess accumulated error
(R - eps) / eps in per cent is 0 for a student that does not drift away (Arora et al., 2022; PromptKD, section 5).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from promptkd.config.deepspeed import DTYPES
from promptkd.config.options import TOKEN_BUDGET
from promptkd.data.batching import group_by_length, make_micro_batches
from promptkd.data.chat_arguments import bind_settings, now
from promptkd.data.prompt_format import choose_rule
from promptkd.distributed.device import peak_memory_gb
from promptkd.distributed.ranks import Ranks, setup
from promptkd.errors import UserError
from promptkd.evaluation.exposure_files import draw, markdown
from promptkd.evaluation.session import RESULTS, check_save, choose_dtype, claim, header, say_notes, warn_of_missing
from promptkd.evaluation.test_sets import TestSet, find_sets, notes_on_sets, read_set
from promptkd.generation.answers import share
from promptkd.generation.budget import decoding_budget
from promptkd.generation.decode import GenerationRequest, decode
from promptkd.generation.sampling import Sampling
from promptkd.losses import FrozenLogits, kl_divergences
from promptkd.models.loading import (
    check_pair,
    check_positions,
    end_ids,
    load_causal_lm,
    load_config,
    load_own_tokenizer,
    load_tokenizer,
)
from promptkd.models.soft_prompt import SoftPrompt, load_prompt
from promptkd.models.tensor_parallel import tensor_parallel_group
from promptkd.models.vocabulary import SharedVocabulary
from promptkd.models.wrapper import LanguageModel
from promptkd.utils.files import fingerprint, write_json, write_text
from promptkd.utils.progress import Progress

RESAMPLED = 1000  # times the rows are drawn anew for the interval
INTERVAL = (2.5, 97.5)  # its percentiles
FILE = "exposure_bias.json"


@dataclass(frozen=True)
class Protocol:
    """How answers are drawn. samples: answers to each prompt from each of the two models.

    Budgets are padded tokens, prompts and answers together: of a batch that is decoded, of a forward pass over answers.
    """

    max_new_tokens: int
    end_ids: Sequence[int]  # end-of-text first, which is all that the published arithmetic knows
    sampling: Sampling
    samples: int
    seed: int
    token_budget: int
    forward_budget: int
    published: bool = False


@torch.no_grad()
def accumulated_errors(
    student: LanguageModel,
    teacher: LanguageModel,
    prompts: Sequence[np.ndarray],
    how: Protocol,
    ranks: Ranks,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """R and eps of each row up to each position: float64 [2, rows, max_new_tokens] on the CPU, the same on all ranks.

    Both models are whole and in eval mode. At a position the errors of a row's samples that reach it are averaged;
    where none does, nothing is added. Student and teacher draw with the same random numbers, so that what differs
    is the models; nothing depends on ranks or token budget (but for rounding), and no generator is touched. In the
    published arithmetic end-of-text alone ends an answer.
    """
    enders = how.end_ids[:1] if how.published else how.end_ids
    sums = torch.zeros(2, len(prompts), how.max_new_tokens, dtype=torch.float64, device=ranks.device)
    alive = torch.zeros_like(sums)
    pairs = share(prompts, how.samples, ranks)
    lengths = [len(prompts[row]) + how.max_new_tokens for _, row in pairs]
    for group in group_by_length(lengths, how.token_budget):
        batch = [pairs[place] for place in group]
        asked = [prompts[row] for _, row in batch]
        for source, writer in enumerate((student, teacher)):
            request = GenerationRequest(
                asked,
                how.max_new_tokens,
                enders,
                how.sampling,
                rng_keys=[(how.seed, row, sample) for sample, row in batch],
                prefix=None if writer.prompt is None else writer.prompt.embeddings,
                shared=writer.shared,
            )
            responses = decode(
                writer.model, request, how.token_budget, progress=progress, broadcast=ranks.broadcast_tp
            ).responses
            states = published_states(asked, responses, how.end_ids[0]) if how.published else (asked, responses)
            for (_, row), errors in zip(batch, state_errors(student, teacher, *states, how.forward_budget)):
                sums[source, row, : len(errors)] += errors
                alive[source, row, : len(errors)] += 1
    sums, alive = ranks.all_reduce_sum(sums), ranks.all_reduce_sum(alive)
    means = sums / (alive + 1e-3) if how.published else sums / alive.clamp(min=1)
    return means.cpu().cumsum(-1)  # CUDA has no deterministic cumsum of floats


def state_errors(student: LanguageModel, teacher: LanguageModel, prompts, responses, token_budget: int) -> list[Tensor]:
    """KL(teacher || student) at the states that predict each response's tokens: float64 [length] each."""
    errors: list[Tensor] = [torch.empty(0)] * len(responses)
    rows = [row for row, response in enumerate(responses) if len(response)]
    prompts, responses = ([texts[row] for row in rows] for texts in (prompts, responses))
    for batch in make_micro_batches(
        prompts, responses, [1.0] * len(rows), token_budget, student.lm_head().weight.device
    ):
        theirs, ours = (FrozenLogits(model.hidden_states(batch), model.lm_head()) for model in (teacher, student))
        parts = kl_divergences(theirs, ours).double().split([len(responses[i]) for i in batch.members])
        for i, part in zip(batch.members, parts):
            errors[rows[i]] = part
    return errors


def published_states(prompts, responses, eos_id: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Prompts and responses so that `state_errors` sees the states the published code does.

    It masks whatever equals end-of-text, in prompts too: a token that no other attends to and that takes no position
    is a token that is not there. It reads one state too far: the first is the one after the first response token, the
    last the one after the last token before end-of-text; what that one predicts is never looked at.
    """
    kept = [
        (prompt[prompt != eos_id], response[response != eos_id].numpy()) for prompt, response in zip(prompts, responses)
    ]
    fronts = [np.concatenate([prompt, response[:1]]) for prompt, response in kept]
    rests = [np.append(response[1:], eos_id)[: len(response)] for _, response in kept]
    return fronts, rests


def curves(errors: Tensor, seed: int) -> dict[str, list[float | None]]:
    """Over rows, for each position: mean and deviation of R and eps, ex_acc_err in per cent with a 95 % interval.

    errors: see `accumulated_errors`. The deviations are unbiased (None for a single row). The interval resamples
    rows, R and eps together. None also where eps is 0.
    """
    students, teachers = errors.numpy()
    rows = len(students)
    drawn = np.random.Generator(np.random.Philox(seed)).multinomial(rows, [1 / rows] * rows, size=RESAMPLED) / rows
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.percentile(_excess(drawn @ students, drawn @ teachers), INTERVAL, axis=0)
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


def check_shared(shared: SharedVocabulary, sets: list[TestSet], protocol: Protocol, ranks: Ranks) -> None:
    """Refuse prompts with a token that a model has no embedding for, and say which tokens are compared."""
    for each in sets:
        shared.check_inputs((f"{each.path}: prompt {i + 1}", ids) for i, ids in enumerate(each.prompts))
    if ranks.is_main:
        print(f"evaluate.py: note: {shared.notice(protocol.end_ids)}", file=sys.stderr, flush=True)


def run(settings: SimpleNamespace) -> None:
    """Measure one student against one teacher on all sets; write and print the curves and the table."""
    what, data, how = settings.evaluation, settings.data, settings.exposure_bias
    folder = Path(what.save)
    check_save(folder, what.overwrite)
    check_settings(settings)
    found, missing = find_sets(data.data_dir, data.data_names.split())
    for path, option in ((what.model_path, "--model-path"), (how.teacher_model_path, "--teacher-model-path")):
        check_positions(load_config(path, option), data.max_length, option)
    tokenizer = load_own_tokenizer(what.model_path, load_config(what.model_path, "--model-path"), "--model-path")
    ranks = setup(settings.parallel.size, settings.device)
    bind_settings(tokenizer, data, ranks.world.all_gather_objects([now()])[0])
    data.special_tokens = choose_rule(data.special_tokens, what.model_path, how.teacher_model_path)
    reading = data.max_prompt_length, data.dev_num, data.prompt_cut == "start", data.template, data.special_tokens
    sets = [read_set(name, path, tokenizer, *reading) for name, path in found.items()]
    dtype = choose_dtype(what.dtype, what.deepspeed_config, ranks.device)
    student, teacher = load_pair(settings, tokenizer, DTYPES[dtype], ranks)
    budgets = [decoding_budget([each.model], data.max_length, ranks, data.token_budget) for each in (student, teacher)]
    data.token_budget = min(budgets)
    protocol = Protocol(
        max_new_tokens=data.max_length - data.max_prompt_length,
        end_ids=end_ids(tokenizer, student.model, teacher.model),
        sampling=Sampling(**dataclasses.asdict(settings.decoding)),
        samples=how.sample_times or (3 if settings.decoding.do_sample else 1),
        seed=what.seed,
        token_budget=data.token_budget,
        forward_budget=min(data.token_budget, TOKEN_BUDGET[ranks.device.type]),
        published=how.published,
    )
    if (shared := student.shared) is not None:
        check_shared(shared, sets, protocol, ranks)
    warn_of_missing(missing, ranks)
    claim(folder, ranks)
    models = {"--model-path": what.model_path, "--teacher-model-path": how.teacher_model_path}
    say_notes(notes_on_sets(sets, models), ranks)
    results = header(settings, missing, ranks, dtype)
    results["protocol"] |= {"sample_times": protocol.samples, "published": how.published}
    if shared is not None:
        results["protocol"]["shared_tokens"] = len(shared)
    results["teacher"] = _described(how.teacher_model_path) | {"prompt": how.teacher_prompt}
    measure_sets(sets, student, teacher, protocol, ranks, results, folder)
    if ranks.is_main:
        results["run"]["peak_memory_gb"] = round(peak_memory_gb(ranks.device), 3)
        text = markdown(results)
        write_text(folder / "results.md", text)
        write_json(folder / RESULTS, results)
        print(f"{text}\nwritten to {folder}/")
    ranks.barrier()


def check_settings(settings: SimpleNamespace) -> None:
    """Raise UserError for options that contradict each other."""
    what, how, greedy = settings.evaluation, settings.exposure_bias, not settings.decoding.do_sample
    if not how.teacher_model_path:
        raise UserError("--type exposure_bias needs --teacher-model-path: name the teacher's folder")
    if what.rouge_tokenizer != "unicode":
        raise UserError("--type exposure_bias computes no ROUGE-L: leave --rouge-tokenizer out")
    if len(what.seeds) > 1:
        raise UserError("--type exposure_bias takes one seed: --sample-times draws several answers with it")
    if greedy and (how.sample_times or 1) > 1:
        raise UserError("--no-do-sample gives the same answer each time: leave --sample-times out")
    if how.published and settings.data.prompt_cut == "start":
        raise UserError("--published keeps the first tokens of prompts: leave --prompt-cut out")


def load_pair(settings: SimpleNamespace, tokenizer, dtype: torch.dtype, ranks: Ranks):
    """Student and teacher (with its prompt, if one is named), checked against each other."""
    what, data, how = settings.evaluation, settings.data, settings.exposure_bias
    group = tensor_parallel_group(ranks, settings.parallel.size)
    student = load_causal_lm(what.model_path, dtype, "--model-path", what.model_type, group)
    teacher = load_causal_lm(how.teacher_model_path, dtype, "--teacher-model-path", group=group)
    shared = check_pair(student, teacher, tokenizer, load_tokenizer(how.teacher_model_path))
    prompt = None
    if how.teacher_prompt:
        prompt = SoftPrompt(load_prompt(Path(how.teacher_prompt), teacher.get_input_embeddings().weight.size(1)))
        check_positions(teacher.config, data.max_length + len(prompt), "--teacher-model-path")
    models = LanguageModel(student, shared=shared), LanguageModel(teacher, prompt, shared)
    return tuple(model.to(ranks.device) for model in models)


def measure_sets(
    sets: list[TestSet], student, teacher, protocol: Protocol, ranks: Ranks, results, folder: Path
) -> None:
    """Fill in `results["sets"]`; write each set's curves, to a folder of its own where there are several sets."""
    total = sum(len(share(each.prompts, protocol.samples, ranks)) for each in sets)
    bar = Progress("", 2 * total, ranks.is_main, unit="answer")
    for each in sets:
        began = time.perf_counter()
        bar.start(each.name)
        found = curves(accumulated_errors(student, teacher, each.prompts, protocol, ranks, bar.update), protocol.seed)
        about = {
            "file": str(each.path), "sha256": each.sha256(), "rows": len(each), "rows_cut": each.cut,
            "rows_spelling_special_tokens": each.spelled,
            "partial": each.partial, "published_rows": each.published_rows,
        }  # fmt: skip
        last = {name: values[-1] for name, values in found.items()}
        results["sets"][each.name] = about | last | {"seconds": round(time.perf_counter() - began, 3)}
        if ranks.is_main:
            place = folder if len(sets) == 1 else folder / each.name
            place.mkdir(exist_ok=True)
            same = {key: results[key] for key in ("type", "model", "teacher", "protocol", "seeds")}
            write_json(place / FILE, {**found, "set": each.name, **about, **same})
            draw(found, place / "exposure_bias.png", f"{results['model']['path']} on {each.name}")
    bar.close()


def _described(path: str) -> dict[str, Any]:
    return {"path": path, "fingerprint": fingerprint(path) if Path(path).is_dir() else None}
