"""Compare the answers of two results by a judge: win, tie and loss in both orders, with a bootstrap interval."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import torch

from promptkd.data.row_files import read_rows
from promptkd.data.rows import read_row, render_prompt
from promptkd.distributed.ranks import Ranks
from promptkd.errors import RunError, UserError
from promptkd.evaluation.answer_store import AnswerStore
from promptkd.reporting.bootstrap import Difference, paired_bootstrap
from promptkd.reporting.judge_server import SYSTEM, JudgeSettings, Reply, ask, verdict_of
from promptkd.reporting.results import Result, is_unchanged
from promptkd.utils.files import write_json, write_text
from promptkd.utils.progress import Progress
from promptkd.utils.tables import Table

PATIENCE = 20  # failures in a row, after which nothing more is asked
NO_VERDICT = "no verdict"
# Verdicts in both orders -> outcome for the first model. Other verdicts depend on the order, and are a tie.
OUTCOMES: dict[Any, str] = {("A", "B"): "win", ("C", "C"): "tie", ("B", "A"): "loss"}
COUNTS = ("pairs", "win", "tie", "loss", "orders_disagree", "not_judged")


class Pair(NamedTuple):
    """A prompt and the answers of both models."""

    set: str
    row: int
    prompt: str
    answers: tuple[str, str]


def read_pairs(results: Sequence[Result], rows: int | None) -> list[Pair]:
    """Return the answers with the first seed to the first `rows` rows (None: all) of the sets that both results have.

    Raises:
        UserError: The results have no set in common, or a test set's file has changed.
    """
    pairs, (first, second) = [], results
    for name in [name for name in first.sets if name in second.sets]:
        entry = first.sets[name]
        if not is_unchanged(entry) or second.sets[name]["sha256"] != entry["sha256"]:
            raise UserError(f"{entry['file']} is not the file of both evaluations: restore it, or evaluate again")
        answers = zip(first.answers(name), second.answers(name))
        for row, ((where, raw), both) in enumerate(islice(zip(read_rows(entry["file"]), answers), rows)):
            pairs.append(Pair(name, row, render_prompt(read_row(raw, where), where), both))
    if not pairs:
        raise UserError(f"{first.folder} and {second.folder} have no test set in common: evaluate both on one")
    return pairs


def judge(results: Sequence[Result], settings: JudgeSettings) -> str:
    """Ask about all pairs in both orders, write judge.json, judge.md and judgments.jsonl, and return the table.

    Replies are stored as they come, and the same command continues. Requests that failed are sent again then.

    Raises:
        UserError: The results cannot be compared, or the folder holds other replies.
        RunError: Some requests failed. Everything is written before.
    """
    pairs, save = read_pairs(results, settings.rows), Path(settings.save)
    requests = [(pair.prompt, *answers) for pair in pairs for answers in (pair.answers, pair.answers[::-1])]
    identity = {"model": settings.model, "max_tokens": settings.max_tokens, "pairs": len(pairs)}
    identity["sha256"] = hashlib.sha256(json.dumps([SYSTEM, requests]).encode()).hexdigest()
    store = AnswerStore(save, identity, settings.overwrite, Ranks(0, 1, torch.device("cpu")), "judgments.jsonl")
    store.begin()
    rows = judgments(pairs, ask_all(requests, settings, store))
    store.finish(rows)
    names, folders = [result.name for result in results], [str(result.folder) for result in results]
    sets = dict.fromkeys(pair.set for pair in pairs)
    summaries = {name: summarize([row for row in rows if row["set"] == name]) for name in sets}
    record = {"names": names, "folders": folders, "judge": dataclasses.asdict(settings), "sets": summaries}
    write_json(save / "judge.json", record)
    write_text(save / "judge.md", text := markdown(names, settings.model, summaries))
    failures = Counter(problem for row in rows for problem in row["problems"] if problem != NO_VERDICT)
    if failures:
        server = f"{len(requests)} requests to {settings.base_url}"
        problem = f"{failures.total()} of {server} have no reply ({listed(failures)})"
        raise RunError(f"{problem}: {save}/judge.md leaves their pairs out, and the same command sends them again")
    return text


def ask_all(requests: Sequence[tuple[str, str, str]], settings: JudgeSettings, store: AnswerStore) -> list[Reply]:
    """Send the requests that have no stored reply, and return the replies to all."""
    replies = {number: Reply(text) for number, text in store.answers.items()}
    missing = [number for number in range(len(requests)) if number not in replies]
    bar = Progress("judge", len(requests), True, unit="request", done=len(replies))
    failures_in_row = 0
    with ThreadPool(min(settings.parallel, len(missing) + 1)) as pool:
        for number, reply in pool.imap_unordered(lambda i: (i, ask(settings, *requests[i])), missing):
            replies[number] = reply
            failures_in_row = failures_in_row + 1 if reply.failure else 0
            if not reply.failure:
                store.add({number: reply.text})
            bar.update()
            if failures_in_row == PATIENCE:
                break
    bar.close()
    return [replies.get(number, Reply(failure="given up")) for number in range(len(requests))]


def judgments(pairs: Sequence[Pair], replies: Sequence[Reply]) -> list[dict[str, Any]]:
    """Return a line of judgments.jsonl for each pair: the outcome for the first model, and the judge's two replies.

    A model wins where the judge prefers it in both orders. Where the orders disagree, the outcome is a tie. A pair
    without two verdicts has no outcome.
    """
    rows = []
    for pair, *both in zip(pairs, replies[::2], replies[1::2]):
        verdicts = [verdict_of(reply.text) for reply in both]
        problems = [reply.failure or NO_VERDICT for reply, verdict in zip(both, verdicts) if verdict is None]
        row = {"set": pair.set, "index": pair.row, "verdicts": verdicts, "replies": [reply.text for reply in both]}
        outcome = None if problems else OUTCOMES.get(tuple(verdicts), "tie")
        rows.append(row | {"problems": problems, "outcome": outcome})
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Count outcomes and problems, and return the difference of wins and losses in percent with its interval."""
    judged = [row for row in rows if row["outcome"] is not None]
    wins, losses = ([100.0 * (row["outcome"] == outcome) for row in judged] for outcome in ("win", "loss"))
    return {
        "pairs": len(rows),
        **{outcome: sum(row["outcome"] == outcome for row in judged) for outcome in OUTCOMES.values()},
        "orders_disagree": sum(tuple(row["verdicts"]) not in OUTCOMES for row in judged),
        "not_judged": len(rows) - len(judged),
        "problems": dict(Counter(problem for row in rows for problem in row["problems"])),
        "win_minus_loss": dataclasses.asdict(paired_bootstrap([wins], [losses])) if judged else None,
    }


def markdown(names: Sequence[str], model: str, summaries: dict[str, dict[str, Any]]) -> str:
    """Format judge.md."""
    heads = [name.replace("_", " ") for name in COUNTS]
    table = Table(["set", *heads, "win - loss, %", "95 % interval", "p", "problems"])
    for name, entry in summaries.items():
        difference = entry["win_minus_loss"]
        cells = Difference(**difference).cells(digits=1) if difference else ["-", "-", "-"]
        table.add(name, *(f"{entry[count]:,}" for count in COUNTS), *cells, listed(entry["problems"]))
    return (
        f"# {names[0]} against {names[1]}\n\n{table.markdown()}\n\n"
        f"Judge: {model}. A win of {names[0]} is one in both orders of the answers. A tie is a tie in both orders, or "
        "verdicts that depend on the order. Pairs without two verdicts are not judged and count nowhere else.\n"
    )


def listed(counts: Mapping[str, int]) -> str:
    """Format how often each kind of problem occurred."""
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items())
