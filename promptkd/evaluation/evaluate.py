"""Answer test sets with one model and score the answers by ROUGE-L."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from promptkd.data.thoughts import answer_text
from promptkd.distributed.rendezvous import environment_number
from promptkd.errors import UserError
from promptkd.evaluation.exposure_bias import load_pair
from promptkd.evaluation.metrics import answer_columns, expand, with_intervals
from promptkd.evaluation.options import ANSWER_METRICS
from promptkd.evaluation.rouge import ScoringPool, default_workers
from promptkd.evaluation.session import Session, describe_model, open_evaluation
from promptkd.evaluation.tables import Row, by_seed, markdown, summary, write_answers
from promptkd.evaluation.teacher_forcing import draw_reliability, reference_columns, reliability
from promptkd.evaluation.test_sets import TestSet
from promptkd.generation.answers import decode_share, share
from promptkd.generation.sampling import Sampling
from promptkd.models.loading import end_ids
from promptkd.models.wrapper import LanguageModel
from promptkd.utils.progress import Progress


def run(settings: SimpleNamespace) -> None:
    """Evaluate one model on all sets with all seeds. Write and print the table."""
    options = settings.evaluation
    if not settings.decoding.do_sample and len(options.seeds) > 1:
        raise UserError("--no-do-sample gives the same answers whatever the seed: give one seed")
    teacher_path = settings.exposure_bias.teacher_model_path
    if "kl" in options.metrics and not teacher_path:
        raise UserError("--metrics kl needs --teacher-model-path: name the teacher's folder")
    models = {"--model-path": options.model_path}
    models |= {"--teacher-model-path": teacher_path} if "kl" in options.metrics else {}
    session = open_evaluation(settings, models)
    teacher: LanguageModel | None = None
    if "kl" in options.metrics:
        model, teacher = load_pair(session)
    else:
        model = session.load_answering(options)
    session.choose_token_budget(model)
    results = session.begin()
    results["protocol"]["rouge_tokenizer"] = options.rouge_tokenizer
    if teacher is not None:
        results["teacher"] = describe_model(teacher_path, settings.exposure_bias.teacher_prompt)
        if (shared := teacher.shared) is not None:
            session.print_notes([f"note: {shared.notice(end_ids(session.tokenizer, model.model))}"])
            results["teacher"]["shared_tokens"] = len(shared)
    evaluate_sets(session, model, teacher, results)
    session.finish(results, markdown(results))


def evaluate_sets(
    session: Session, model: LanguageModel, teacher: LanguageModel | None, results: dict[str, Any]
) -> None:
    """Fill in `results["sets"]`, and write the answers of each set when it is done."""
    options, ranks = session.settings.evaluation, session.ranks
    count = sum(len(share(each.prompts, len(options.seeds), ranks)) for each in session.sets)
    bar = Progress("", count, ranks.is_main, unit="answer")
    local_ranks = environment_number("LOCAL_WORLD_SIZE", 1)
    with ScoringPool(default_workers(local_ranks)) as pool:
        for test_set in session.sets:
            began = time.perf_counter()
            bar.start(test_set.name)
            rows = answer_and_score(session, test_set, model, pool, bar)
            answers = by_seed(rows, len(options.seeds))
            entry = summary(test_set, answers, time.perf_counter() - began)
            for seed, rows_of_seed in zip(options.seeds, answers if ranks.is_main else []):
                write_answers(Path(options.save) / test_set.name / f"seed{seed}", rows_of_seed)
            results["sets"][test_set.name] = entry | measure(session, test_set, answers, model, teacher)
    bar.close()


def measure(
    session: Session,
    test_set: TestSet,
    answers: list[list[Row]],
    model: LanguageModel,
    teacher: LanguageModel | None,
) -> dict[str, Any]:
    """Return the `metrics` of a set's entry in results.json, and the bins of the calibration error."""
    options, data, ranks = session.settings.evaluation, session.settings.data, session.ranks
    of_answers = [name for name in options.metrics if name in ANSWER_METRICS]
    columns = answer_columns(answers, of_answers, data.max_length - data.max_prompt_length)
    if test_set.responses:
        forced = reference_columns(model, teacher, test_set, ranks)
        columns |= {name: forced[name] for name in expand(options.metrics) if name in forced}
    entry: dict[str, Any] = {"metrics": with_intervals(columns)}
    if "ece" in columns:
        entry["reliability"] = reliability(columns)
        if ranks.is_main:
            picture = Path(options.save) / test_set.name / "reliability.png"
            ece = entry["metrics"]["ece"]["value"]
            draw_reliability(entry["reliability"], picture, f"next tokens of {test_set.name}, ECE {ece:.1f} %")
    return entry


def answer_and_score(
    session: Session, test_set: TestSet, model: LanguageModel, pool: ScoringPool, bar: Progress
) -> list[Row]:
    """Return the scored answers of all ranks to one set.

    Each rank scores its own answers while it decodes the next batch.
    """
    settings, tokenizer = session.settings, session.tokenizer
    pending = []
    batches = decode_share(
        model.model,
        test_set.prompts,
        settings.evaluation.seeds,
        end_ids=end_ids(tokenizer, model.model),
        max_new_tokens=settings.data.max_length - settings.data.max_prompt_length,
        sampling=Sampling(**dataclasses.asdict(settings.decoding)),
        token_budget=settings.data.token_budget,
        ranks=session.ranks,
        progress=bar.update,
        prefix=model.prefix,
    )
    for batch in batches:
        texts = [answer_text(tokenizer, ids, test_set.prompts[index]) for _, index, ids in batch]
        pairs = [(text, test_set.references[index]) for (text, _), (_, index, _) in zip(texts, batch)]
        pending.append((batch, texts, pool.submit(pairs, settings.evaluation.rouge_tokenizer)))
    rows = [
        Row(seed, index, text, len(ids), *score, thought)
        for batch, texts, scores in pending
        for (seed, index, ids), (text, thought), score in zip(batch, texts, scores.result())
    ]
    return [Row(*row) for row in session.ranks.all_gather_objects(rows)]
