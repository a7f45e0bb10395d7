"""From settings to results: everything is read and checked before anything is written."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from promptkd.config.deepspeed import DTYPES, precision, read_deepspeed_config
from promptkd.data.chat_arguments import bind_settings, now
from promptkd.data.prompt_format import choose_rule
from promptkd.data.thoughts import answer_text
from promptkd.distributed.device import peak_memory_gb
from promptkd.distributed.ranks import Ranks, setup
from promptkd.distributed.rendezvous import environment_number
from promptkd.errors import UserError
from promptkd.evaluation.rouge import ScoringPool, default_workers
from promptkd.evaluation.tables import Row, by_seed, markdown, summary, write_answers
from promptkd.evaluation.test_sets import Missing, TestSet, find_sets, notes_on_sets, read_set
from promptkd.generation.answers import decode_share, share
from promptkd.generation.budget import decoding_budget
from promptkd.generation.sampling import Sampling
from promptkd.models.loading import check_positions, end_ids, load_causal_lm, load_config, load_own_tokenizer
from promptkd.models.tensor_parallel import tensor_parallel_group
from promptkd.utils.files import fingerprint, write_json, write_text
from promptkd.utils.progress import Progress

RESULTS = "results.json"


def run(settings: SimpleNamespace) -> None:
    """Evaluate one model on all sets with all seeds; write and print the table."""
    what, data = settings.evaluation, settings.data
    folder = Path(what.save)
    check_save(folder, what.overwrite)
    if not settings.decoding.do_sample and len(what.seeds) > 1:
        raise UserError("--no-do-sample gives the same answers whatever the seed: give one seed")
    found, missing = find_sets(data.data_dir, data.data_names.split())
    config = load_config(what.model_path, "--model-path")
    check_positions(config, data.max_length, "--model-path")
    tokenizer = load_own_tokenizer(what.model_path, config, "--model-path")
    ranks = setup(settings.parallel.size, settings.device)
    bind_settings(tokenizer, data, ranks.world.all_gather_objects([now()])[0])
    data.special_tokens = choose_rule(data.special_tokens, what.model_path)
    how = data.max_prompt_length, data.dev_num, data.prompt_cut == "start", data.template, data.special_tokens
    sets = [read_set(name, path, tokenizer, *how) for name, path in found.items()]
    dtype = choose_dtype(what.dtype, what.deepspeed_config, ranks.device)
    warn_of_missing(missing, ranks)
    group = tensor_parallel_group(ranks, settings.parallel.size)
    model = load_causal_lm(what.model_path, DTYPES[dtype], "--model-path", what.model_type, group).to(ranks.device)
    data.token_budget = decoding_budget([model], data.max_length, ranks, data.token_budget)
    claim(folder, ranks)
    say_notes(notes_on_sets(sets, {"--model-path": what.model_path}), ranks)
    results = header(settings, missing, ranks, dtype)
    results["protocol"]["rouge_tokenizer"] = what.rouge_tokenizer
    evaluate_sets(settings, sets, model, tokenizer, ranks, results)
    if ranks.is_main:
        results["run"]["peak_memory_gb"] = round(peak_memory_gb(ranks.device), 3)
        write_text(folder / "results.md", markdown(results))
        write_json(folder / RESULTS, results)
        print(f"{markdown(results)}\nwritten to {folder}/")
    ranks.barrier()


def warn_of_missing(missing: list[Missing], ranks: Ranks) -> None:
    """Name the sets that are not there on stderr, with what gets them."""
    for lost in missing if ranks.is_main else []:
        print(f"evaluate.py: warning: {lost}", file=sys.stderr, flush=True)


def say_notes(notes: list[str], ranks: Ranks) -> None:
    """Print notes on the prompts to stderr, once."""
    for note in notes if ranks.is_main else []:
        print(f"evaluate.py: {note}", file=sys.stderr, flush=True)


def evaluate_sets(settings, sets: list[TestSet], model: PreTrainedModel, tokenizer, ranks: Ranks, results) -> None:
    """Fill in `results["sets"]`, and write the answers of each set when it is done."""
    seeds, folder = settings.evaluation.seeds, Path(settings.evaluation.save)
    bar = Progress("", sum(len(share(s.prompts, len(seeds), ranks)) for s in sets), ranks.is_main, unit="answer")
    local_ranks = environment_number("LOCAL_WORLD_SIZE", 1)
    with ScoringPool(default_workers(local_ranks)) as pool:
        for test_set in sets:
            began = time.perf_counter()
            bar.start(test_set.name)
            rows = answer_and_score(settings, test_set, model, tokenizer, ranks, pool, bar)
            answers = by_seed(rows, len(seeds))
            results["sets"][test_set.name] = summary(test_set, answers, time.perf_counter() - began)
            for seed, rows_of_seed in zip(seeds, answers if ranks.is_main else []):
                write_answers(folder / test_set.name / f"seed{seed}", rows_of_seed)
    bar.close()


def answer_and_score(settings, test_set: TestSet, model, tokenizer, ranks: Ranks, pool: ScoringPool, bar) -> list[Row]:
    """The scored answers of all ranks to one set. Each rank scores its own, while it decodes the next batch."""
    data, pending = settings.data, []
    batches = decode_share(
        model,
        test_set.prompts,
        settings.evaluation.seeds,
        end_ids=end_ids(tokenizer, model),
        max_new_tokens=data.max_length - data.max_prompt_length,
        sampling=Sampling(**dataclasses.asdict(settings.decoding)),
        token_budget=data.token_budget,
        ranks=ranks,
        progress=bar.update,
    )
    for batch in batches:
        said = [answer_text(tokenizer, ids, test_set.prompts[index]) for _, index, ids in batch]
        pairs = [(text, test_set.references[index]) for (text, _), (_, index, _) in zip(said, batch)]
        scores = pool.submit(pairs, settings.evaluation.rouge_tokenizer)
        pending.append((batch, said, scores))
    mine = [
        Row(seed, index, text, len(ids), *score, thought)
        for batch, said, scores in pending
        for (seed, index, ids), (text, thought), score in zip(batch, said, scores.result())
    ]
    return [Row(*row) for row in ranks.all_gather_objects(mine)]


def header(settings: SimpleNamespace, missing: list, ranks: Ranks, dtype: str) -> dict[str, Any]:
    """results.json without the sets. `protocol` is what has to agree where results are compared, but for
    dev_num: there the rows have to."""
    what, data = settings.evaluation, settings.data
    path = what.model_path
    return {
        "type": what.type,
        "model": {"path": path, "fingerprint": fingerprint(path) if Path(path).is_dir() else None},
        "protocol": {
            **dataclasses.asdict(settings.decoding),
            "max_length": data.max_length,
            "max_prompt_length": data.max_prompt_length,
            "prompt_cut": data.prompt_cut,
            "dev_num": data.dev_num,
            "template": data.template,
            **({"chat_template_kwargs": data.chat_template_kwargs} if data.chat_template_kwargs else {}),
            "special_tokens": data.special_tokens,
        },
        "seeds": what.seeds,
        "run": {
            "dtype": dtype,
            "device": ranks.device.type,
            **dataclasses.asdict(settings.device),
            "ranks": ranks.world.dp_size,
            "token_budget": data.token_budget,
            "template_time": data.template_time,
        },
        "missing": [dataclasses.asdict(lost) for lost in missing],
        "sets": {},
    }


def choose_dtype(name: str, deepspeed_config: str | None, device: torch.device) -> str:
    """ "auto" is the DeepSpeed file's precision; without one bf16 on a GPU that has it, fp16 on another, fp32 on a CPU.

    Raises UserError for fp16 on a CPU and for a file that training would refuse.
    """
    if name == "auto":
        return precision(read_deepspeed_config(deepspeed_config, device))
    if name == "fp16" and device.type == "cpu":
        raise UserError("--dtype fp16 needs a GPU: use fp32 or bf16 on a CPU")
    return name


def check_save(folder: Path, overwrite: bool) -> None:
    """Raise UserError when the folder holds results already, or cannot be one."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save {folder} is a file: name a folder")
    if (folder / RESULTS).exists() and not overwrite:
        raise UserError(
            f"--save {folder} already holds results: --overwrite replaces them, --save names another folder"
        )


def claim(folder: Path, ranks: Ranks) -> None:
    """Make the folder, without what an earlier evaluation left there; no rank goes on before that is done."""
    ranks.barrier()  # every rank has looked for earlier results by now
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save {folder} cannot be made ({error.strerror}): name another folder") from None
        # A folder of that name is no test set's but a measurement of its own, see tools/report.py.
        inside = [path for path in folder.glob("*/exposure_bias.*") if path.parent.name != "exposure_bias"]
        curves = [*folder.glob("exposure_bias.*"), *inside]
        for old in [folder / RESULTS, folder / "results.md", *folder.glob("*/seed*/answers.jsonl"), *curves]:
            old.unlink(missing_ok=True)
    ranks.barrier()
