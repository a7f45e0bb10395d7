"""Compare the answers of two results by a judge: win, tie and loss in both orders, with a bootstrap interval."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from promptkd.data.row_files import read_rows
from promptkd.data.rows import read_row, render_prompt
from promptkd.distributed.ranks import Ranks
from promptkd.errors import RunError, UserError
from promptkd.evaluation.answer_store import AnswerStore
from promptkd.reporting.bootstrap import paired_bootstrap
from promptkd.reporting.judge_server import SYSTEM, JudgeServer, NoReply, verdict_of
from promptkd.reporting.results import Result, is_unchanged
from promptkd.utils.files import write_json, write_text
from promptkd.utils.progress import Progress
from promptkd.utils.tables import Table

JUDGMENTS = "judgments.jsonl"
PATIENCE = 20  # failures in a row, after which nothing more is asked
POINTS = {"A": 1, "B": -1, "C": 0}  # of the answer that the judge reads first
OUTCOMES = {1: "win", 0: "tie", -1: "loss"}


class Pair(NamedTuple):
    """A prompt and the answers of both models."""

    set: str
    row: int
    prompt: str
    answers: tuple[str, str]


def read_pairs(first: Result, second: Result, rows: int | None) -> list[Pair]:
    """Return the answers with the first seed to the first `rows` rows (None: all) of the sets that both results have.

    Raises:
        UserError: The results have no set in common, or a test set's file has changed.
    """
    pairs = []
    for name, entry in first.sets.items():
        if name not in second.sets:
            continue
        if not is_unchanged(entry) or second.sets[name]["sha256"] != entry["sha256"]:
            problem = f"{entry['file']} is missing or not the file of both evaluations"
            raise UserError(f"{problem}: restore it, or evaluate again")
        answers = zip(first.answers(name), second.answers(name))
        for row, ((where, raw), pair) in enumerate(islice(zip(read_rows(entry["file"]), answers), rows)):
            pairs.append(Pair(name, row, render_prompt(read_row(raw, where), where), pair))
    if not pairs:
        raise UserError(f"{first.folder} and {second.folder} have no test set in common: evaluate both on one")
    return pairs


def judge(
    results: tuple[Result, Result],
    pairs: Sequence[Pair],
    server: JudgeServer,
    save: Path,
    parallel: int,
    overwrite: bool,
) -> str:
    """Ask about all pairs in both orders, write judge.json, judge.md and judgments.jsonl, and return the table.

    Replies are stored as they come, and the same command continues. Requests that failed are sent again then.

    Raises:
        UserError: The folder holds other replies.
        RunError: Some requests failed. Everything is written before.
    """
    content = json.dumps([SYSTEM, pairs])
    identity = {"model": server.model, "max_tokens": server.max_tokens, "pairs": len(pairs)}
    identity["sha256"] = hashlib.sha256(content.encode()).hexdigest()
    store = AnswerStore(save, identity, overwrite, Ranks(0, 1, torch.device("cpu")), JUDGMENTS)
    replies, failures = ask_all(pairs, server, store, parallel)
    rows = judgments(pairs, replies, failures)
    store.finish(rows)
    names = [result.name for result in results]
    sets = [*dict.fromkeys(pair.set for pair in pairs)]
    summaries = {name: summarize([row for row in rows if row["set"] == name]) for name in sets}
    summaries |= {"all sets": summarize(rows)} if len(sets) > 1 else {}
    folders = [str(result.folder) for result in results]
    record = {"names": names, "folders": folders, "judge": dataclasses.asdict(server), "sets": summaries}
    text = markdown(names, server.model, summaries)
    write_json(save / "judge.json", record)
    write_text(save / "judge.md", text)
    if failures:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(failures.values()).items())
        raise RunError(
            f"{len(failures)} of {2 * len(pairs)} requests have no reply ({kinds}): {save}/judge.md leaves their pairs "
            "out, and the same command sends them again"
        )
    return text


def ask_all(
    pairs: Sequence[Pair], server: JudgeServer, store: AnswerStore, parallel: int
) -> tuple[dict[int, str], dict[int, str]]:
    """Return the replies, and the kinds of failure of requests without one.

    Request 2 i is about pair i, request 2 i + 1 about the same answers in the other order.
    """
    replies, failures, in_row = dict(store.answers), {}, 0
    missing = [number for number in range(2 * len(pairs)) if number not in replies]
    bar = Progress("judge", 2 * len(pairs), True, unit="reply", done=len(replies))
    pool = ThreadPoolExecutor(parallel)
    try:
        orders = {number: pairs[number // 2].answers[:: -1 if number % 2 else 1] for number in missing}
        asked = {pool.submit(server.ask, pairs[number // 2].prompt, *orders[number]): number for number in missing}
        for future in as_completed(asked):
            number = asked[future]
            try:
                replies[number] = future.result()
                store.add({number: replies[number]})
                in_row = 0
            except NoReply as error:
                failures[number] = str(error)
                in_row += 1
            bar.update()
            if in_row == PATIENCE:
                break
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    return replies, failures | {n: "given up" for n in missing if n not in replies and n not in failures}


def judgments(pairs: Sequence[Pair], replies: dict[int, str], failures: dict[int, str]) -> list[dict[str, Any]]:
    """Return a line of judgments.jsonl for each pair: the outcome for the first model, and the judge's replies.

    A model wins where the judge prefers it in both orders. Where the orders disagree, the outcome is a tie. A pair
    without two verdicts has no outcome.
    """
    rows = []
    for i, pair in enumerate(pairs):
        texts = [replies.get(number) for number in (2 * i, 2 * i + 1)]
        verdicts = [None if text is None else verdict_of(text) for text in texts]
        points = [sign * POINTS[verdict] for sign, verdict in zip((1, -1), verdicts) if verdict is not None]
        problems = [failures.get(2 * i + order, "no verdict") for order in (0, 1) if verdicts[order] is None]
        row = {"set": pair.set, "index": pair.row, "verdicts": verdicts, "replies": texts, "problems": problems}
        agreed = len(points) == 2 and points[0] == points[1]
        rows.append(row | {"outcome": None if problems else OUTCOMES[points[0] if agreed else 0], "agreed": agreed})
    return rows


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Count outcomes and problems, and return the difference of wins and losses in percent with its interval."""
    judged = [row for row in rows if row["outcome"] is not None]
    wins, losses = ([100.0 * (row["outcome"] == outcome) for row in judged] for outcome in ("win", "loss"))
    return {
        "pairs": len(rows),
        **{outcome: sum(row["outcome"] == outcome for row in judged) for outcome in OUTCOMES.values()},
        "orders_disagree": sum(not row["agreed"] for row in judged),
        "not_judged": len(rows) - len(judged),
        "problems": dict(Counter(problem for row in rows for problem in row["problems"])),
        "win_minus_loss": dataclasses.asdict(paired_bootstrap([wins], [losses])) if judged else None,
    }


def markdown(names: Sequence[str], model: str, summaries: dict[str, dict[str, Any]]) -> str:
    """Format judge.md."""
    counts = ("pairs", "win", "tie", "loss", "orders_disagree", "not_judged")
    table = Table(["set", *(name.replace("_", " ") for name in counts), "win - loss, %", "95 % interval", "p"])
    notes = []
    for name, entry in summaries.items():
        cells = [name, *(f"{entry[count]:,}" for count in counts)]
        if difference := entry["win_minus_loss"]:
            cells += [f"{difference['mean']:+.1f}", f"{difference['low']:+.1f} to {difference['high']:+.1f}"]
            cells.append(f"{difference['p']:.3f}")
        table.add(*cells)
        if entry["problems"]:
            notes.append(f"{name}: {', '.join(f'{count} x {kind}' for kind, count in entry['problems'].items())}.")
    lines = [
        f"# {names[0]} against {names[1]}",
        table.markdown(),
        f"Judge: {model}. A win of {names[0]} is one in both orders of the answers. A tie is a tie in both orders, or "
        "verdicts that depend on the order. Pairs without two verdicts are not judged and count nowhere else.",
        *notes,
    ]
    return "\n\n".join(lines) + "\n"
