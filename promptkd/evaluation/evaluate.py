"""Answer test sets with one model and score the answers by ROUGE-L."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from promptkd.data.thoughts import answer_text
from promptkd.distributed.rendezvous import environment_number
from promptkd.errors import UserError
from promptkd.evaluation.rouge import ScoringPool, default_workers
from promptkd.evaluation.session import Session, open_evaluation
from promptkd.evaluation.tables import Row, by_seed, markdown, summary, write_answers
from promptkd.evaluation.test_sets import TestSet
from promptkd.generation.answers import decode_share, share
from promptkd.generation.sampling import Sampling
from promptkd.models.loading import end_ids
from promptkd.utils.progress import Progress

Answering = tuple[PreTrainedModel, Tensor | None]  # a model and its soft prompt


def run(settings: SimpleNamespace) -> None:
    """Evaluate one model on all sets with all seeds. Write and print the table."""
    options = settings.evaluation
    if not settings.decoding.do_sample and len(options.seeds) > 1:
        raise UserError("--no-do-sample gives the same answers whatever the seed: give one seed")
    session = open_evaluation(settings, {"--model-path": options.model_path})
    answering = session.load_answering(options)
    results = session.begin()
    results["protocol"]["rouge_tokenizer"] = options.rouge_tokenizer
    evaluate_sets(session, answering, results)
    session.finish(results, markdown(results))


def evaluate_sets(session: Session, answering: Answering, results: dict[str, Any]) -> None:
    """Fill in `results["sets"]`, and write the answers of each set when it is done."""
    options, ranks = session.settings.evaluation, session.ranks
    count = sum(len(share(each.prompts, len(options.seeds), ranks)) for each in session.sets)
    bar = Progress("", count, ranks.is_main, unit="answer")
    local_ranks = environment_number("LOCAL_WORLD_SIZE", 1)
    with ScoringPool(default_workers(local_ranks)) as pool:
        for test_set in session.sets:
            began = time.perf_counter()
            bar.start(test_set.name)
            rows = answer_and_score(session, test_set, answering, pool, bar)
            answers = by_seed(rows, len(options.seeds))
            results["sets"][test_set.name] = summary(test_set, answers, time.perf_counter() - began)
            for seed, rows_of_seed in zip(options.seeds, answers if ranks.is_main else []):
                write_answers(Path(options.save) / test_set.name / f"seed{seed}", rows_of_seed)
    bar.close()


def answer_and_score(
    session: Session, test_set: TestSet, answering: Answering, pool: ScoringPool, bar: Progress
) -> list[Row]:
    """Return the scored answers of all ranks to one set.

    Each rank scores its own answers while it decodes the next batch.
    """
    settings, tokenizer, (model, prompt) = session.settings, session.tokenizer, answering
    pending = []
    batches = decode_share(
        model,
        test_set.prompts,
        settings.evaluation.seeds,
        end_ids=end_ids(tokenizer, model),
        max_new_tokens=settings.data.max_length - settings.data.max_prompt_length,
        sampling=Sampling(**dataclasses.asdict(settings.decoding)),
        token_budget=settings.data.token_budget,
        ranks=session.ranks,
        progress=bar.update,
        prefix=prompt,
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
