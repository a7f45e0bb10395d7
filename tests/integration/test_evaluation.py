"""Evaluation: test sets, answers that do not depend on how they were made, evaluate.py from end to end."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.evaluating import MODEL, evaluated, options, refused, write_set
from helpers.tokenizer_kinds import byte_level
from helpers.training import ROOT, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from promptkd.errors import UserError
from promptkd.evaluation.options import ANSWER_METRICS, REFERENCE_METRICS
from promptkd.evaluation.rouge import rouge_l
from promptkd.evaluation.test_sets import PUBLISHED_ROWS, canonical, find_sets, read_set
from promptkd.generation.answers import decode_share, gather_texts, share
from promptkd.generation.sampling import Sampling

PROMPTS = [np.arange(5, 5 + length, dtype=np.int64) for length in (3, 9, 4, 12, 7, 5)]


@dataclass
class OneOf:
    """A rank that sees its own share alone."""

    dp_rank: int
    dp_size: int

    def all_gather_objects(self, objects: list) -> list:
        return objects

    def broadcast_tp(self, values: torch.Tensor) -> torch.Tensor:
        return values


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


# sets


def test_sets_are_found_in_their_published_folders_by_all_their_names(tmp_path):
    for folder in ("dolly", "self-inst", "sinst/11_", "own"):
        write_set(tmp_path / folder)
    found, missing = find_sets(str(tmp_path), ["dolly", "self_inst", "sinst_11_", "own", "uinst", "vicuna"])
    assert {name: str(path.parent.relative_to(tmp_path)) for name, path in found.items()} == {
        "dolly": "dolly", "self_inst": "self-inst", "sinst_11_": "sinst/11_", "own": "own",
    }  # fmt: skip
    assert [lost.name for lost in missing] == ["uinst", "vicuna"]
    assert "bash download_requirements.sh --only data/uinst " in str(missing[0])
    alone, _ = find_sets(str(tmp_path / "sinst/11_"), ["sinst_11_"])
    assert alone["sinst_11_"] == tmp_path / "sinst/11_" / "valid.jsonl"


def test_every_name_in_the_published_scripts_is_a_known_set():
    recipes = json.loads((ROOT / "tests/scripts/recipes.json").read_text())
    names = {recipe["data_names"] for script, recipe in recipes.items() if "/eval/" in script}
    assert names == {"dolly", "self_inst", "vicuna", "sinst_11_", "sinst_new_11_", "uinst_11_"}
    assert {canonical(name) for name in names} == set(PUBLISHED_ROWS)


def test_read_set_cuts_the_end_or_the_start_of_a_long_prompt(tmp_path, tokenizer):
    write_set(tmp_path / "own")
    path = tmp_path / "own" / "valid.jsonl"
    whole, end, begin = (read_set("own", path, tokenizer, n, -1, cut) for n, cut in ((99, 0), (8, 0), (8, 1)))
    assert (whole.cut, end.cut, begin.cut) == (0, 6, 6)
    assert whole.prompts[0].tolist() == tokenizer.encode(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nList 1 words.\n\n### Response:\n"
    )
    assert end.prompts[0].tolist() == whole.prompts[0][:8].tolist()
    assert begin.prompts[0].tolist() == whole.prompts[0][-8:].tolist()


def test_read_set_keeps_begin_of_text_when_it_cuts(tmp_path, tokenizer):
    write_set(tmp_path / "own", prompt="one two three four five six seven eight")
    path, plain = tmp_path / "own" / "valid.jsonl", tokenizer.encode("one two three four five six seven eight")
    own = byte_level(begins=True)
    end, start_cut = (read_set("own", path, own, 4, -1, cut).prompts[0].tolist() for cut in (False, True))
    assert end == [own.bos_token_id, *plain[:3]]
    assert start_cut == [own.bos_token_id, *plain[-3:]]


def test_read_set_prefers_a_ready_prompt_and_takes_dev_num_rows(tmp_path, tokenizer):
    write_set(tmp_path / "dolly", prompt="word word")
    rows = read_set("dolly", tmp_path / "dolly" / "valid.jsonl", tokenizer, 8, 4, False)
    assert [ids.tolist() for ids in rows.prompts] == [tokenizer.encode("word word")] * 4
    assert rows.partial and rows.published_rows == 500


# answers


def answers_of(model, tokenizer, ranks, budget=4096, seeds=(10, 20), **sampling) -> list[list[str]]:
    batches = decode_share(
        model, PROMPTS, list(seeds), max_new_tokens=12, end_ids=[tokenizer.eos_token_id],
        sampling=Sampling(no_repeat_ngram_size=3, **sampling), token_budget=budget, ranks=ranks,
    )  # fmt: skip
    return gather_texts(batches, tokenizer, PROMPTS, len(seeds), ranks)


def test_answers_do_not_depend_on_the_token_budget_or_the_other_seeds(model, tokenizer):
    whole = answers_of(model, tokenizer, OneOf(0, 1))
    assert whole[0] != whole[1]
    assert answers_of(model, tokenizer, OneOf(0, 1), budget=1) == whole
    assert answers_of(model, tokenizer, OneOf(0, 1), budget=50) == whole
    assert answers_of(model, tokenizer, OneOf(0, 1), seeds=(20,)) == whole[1:]


def test_the_shares_of_two_ranks_are_the_answers_of_one(model, tokenizer):
    whole = answers_of(model, tokenizer, OneOf(0, 1))
    parts = [answers_of(model, tokenizer, OneOf(rank, 2)) for rank in (0, 1)]
    merged = [[a or b for a, b in zip(*rows)] for rows in zip(*parts)]
    assert merged == whole
    pairs = [share(PROMPTS, 2, OneOf(rank, 2)) for rank in (0, 1)]
    assert not set(pairs[0]) & set(pairs[1])
    assert sorted(pairs[0] + pairs[1]) == [(seed, prompt) for seed in (0, 1) for prompt in range(len(PROMPTS))]


def test_greedy_answers_are_those_of_generate(model, tokenizer):
    ours = answers_of(model, tokenizer, OneOf(0, 1), seeds=(10,), do_sample=False)[0]
    for prompt, text in zip(PROMPTS, ours):
        ids = model.generate(
            torch.from_numpy(prompt)[None], do_sample=False, max_new_tokens=12, no_repeat_ngram_size=3,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        assert text == tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()


def test_progress_counts_every_answer(model, tokenizer):
    counts: list[int] = []
    batches = decode_share(
        model, PROMPTS, [1, 2], max_new_tokens=4, end_ids=[tokenizer.eos_token_id], sampling=Sampling(),
        token_budget=40, ranks=OneOf(0, 1), progress=counts.append,
    )  # fmt: skip
    assert sum(map(len, batches)) == sum(counts) == 2 * len(PROMPTS)


# evaluate.py


def test_evaluate_two_sets_two_seeds_and_a_missing_set(tmp_path, capsys):
    write_set(tmp_path / "data/own")
    write_set(tmp_path / "data/uinst/11_", rows=3)
    argv = options(tmp_path / "data", tmp_path / "out", "--data-names", "own", "vicuna", "uinst", "--seeds", "10", "20")
    results = evaluated(argv)
    screen = capsys.readouterr()
    assert "bash download_requirements.sh --only data/vicuna" in screen.err
    assert [lost["name"] for lost in results["missing"]] == ["vicuna"]
    assert set(results["sets"]) == {"own", "uinst"} and results["seeds"] == [10, 20]
    own, uinst = results["sets"]["own"], results["sets"]["uinst"]
    assert (own["rows"], own["partial"], own["published_rows"]) == (6, False, None)
    assert (uinst["rows"], uinst["partial"], uinst["published_rows"]) == (3, True, 10_000)
    for place, seed in enumerate((10, 20)):
        lines = (tmp_path / f"out/own/seed{seed}/answers.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["index"] for row in rows] == list(range(6))
        assert [row["rougeL"] for row in rows] == own["rougeL_rows"][place]
        scores = [rouge_l(row["answer"], [f"word {row['index']}", "token"]) for row in rows]
        assert own["rougeL"]["per_seed"][place] == pytest.approx(np.mean(scores))
        assert all(0 <= row["length"] <= 16 for row in rows)
    assert own["rougeL"]["std"] == pytest.approx(np.std(own["rougeL"]["per_seed"], ddof=1))
    table = (tmp_path / "out/results.md").read_text()
    assert table in screen.out
    assert "| uinst (partial: 3 of 10,000) | 3 |" in table and "| vicuna | missing |" in table and " ± " in table
    assert not list((tmp_path / "out").rglob("*.new"))


def test_evaluate_is_the_same_on_two_ranks_and_twice(tmp_path):
    write_set(tmp_path / "data")
    extra = ["--data-names", "own", "--seeds", "1", "2", "--metrics", *ANSWER_METRICS, *REFERENCE_METRICS]
    extra += ["--teacher-model-path", str(MODEL.parent / "gpt2_teacher")]
    once = evaluated(options(tmp_path / "data", tmp_path / "one", *extra))
    argv = options(tmp_path / "data", tmp_path / "two", *extra)
    done = start(argv, ranks=2, script="evaluate.py")
    assert done.returncode == 0, done.stderr
    twice = json.loads((tmp_path / "two/results.json").read_text())
    for results in (once, twice):
        results["sets"]["own"].pop("seconds")
    metrics = [results["sets"]["own"].pop("metrics") for results in (once, twice)]
    bins = [results["sets"]["own"].pop("reliability") for results in (once, twice)]
    assert twice["sets"] == once["sets"] and twice["run"]["ranks"] == 2
    assert metrics[1].keys() == metrics[0].keys() and len(metrics[0]) == 12
    for name, metric in metrics[0].items():
        assert metrics[1][name] == pytest.approx(metric, rel=1e-5), name
    assert bins[1]["tokens"] == bins[0]["tokens"]
    for seed in (1, 2):
        name = f"own/seed{seed}/answers.jsonl"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    done = start(["--answers", str(tmp_path / "two"), "--metrics", "cut"], ranks=2, script="evaluate.py")
    assert done.returncode == 0 and done.stdout.count("written to") == 1, done.stderr


def test_evaluate_replaces_results_only_with_overwrite(tmp_path, capsys):
    write_set(tmp_path / "data")
    argv = options(tmp_path / "data", tmp_path / "out", "--data-names", "own", "--dev-num", "2")
    evaluated([*argv, "--seed", "1"])
    capsys.readouterr()
    before = (tmp_path / "out/results.json").read_bytes()
    assert "--overwrite" in refused([*argv, "--seed", "2"], capsys)
    assert (tmp_path / "out/results.json").read_bytes() == before
    assert evaluated([*argv, "--seed", "2", "--overwrite"])["seeds"] == [2]
    assert not (tmp_path / "out/own/seed1/answers.jsonl").exists()


def test_evaluate_without_any_set_is_one_line(tmp_path):
    (tmp_path / "data").mkdir()
    done = start(options(tmp_path / "data", tmp_path / "out"), script="evaluate.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert "bash download_requirements.sh --only data/dolly" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--seeds", "1", "1"], "--seeds 1 1"),
        (["--seeds", "-1"], "--seeds -1"),
        (["--seeds", "1", "--seed", "2"], "leave one out"),
        (["--seeds", "1", "2", "--no-do-sample"], "--no-do-sample"),
        (["--dev-num", "0"], "--dev-num 0"),
        (["--data-names", "own", "own"], "twice"),
        (["--data-names", "../own"], "--data-names ../own"),
        (["--data-names", "own", "--data-dir", "/nowhere"], "--data-dir /nowhere"),
        (["--model-path", "/nowhere/model"], "--model-path /nowhere/model"),
        (["--model-type", "opt"], "--model-type"),
        (["--max-length", "512"], "--max-length"),
        (["--max-prompt-length", "48"], "--max-prompt-length 48"),
        (["--dtype", "fp16"], "--dtype fp16"),
        (["--no-repeat-ngram-siz", "3"], "did you mean --no-repeat-ngram-size"),
        (["--save", str(MODEL / "config.json")], "is a file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, extra, says):
    write_set(tmp_path / "data")
    names = [] if "--data-names" in extra else ["--data-names", "own"]
    assert says in refused(options(tmp_path / "data", tmp_path / "out", *names, *extra), capsys)
    assert not (tmp_path / "out").exists()


def test_read_set_names_the_line_of_a_broken_row(tmp_path, tokenizer):
    write_set(tmp_path / "own")
    path = tmp_path / "own" / "valid.jsonl"
    path.write_text(path.read_text() + '{"instruction": "no output"}\n')
    with pytest.raises(UserError, match=r"valid\.jsonl, line 7"):
        read_set("own", path, tokenizer, 8, -1, False)
