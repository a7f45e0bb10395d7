"""Let the teacher answer the training prompts, for SeqKD.

python tools/generate.py --model-path TEACHER --data-dir processed_data/dolly/full/gpt2 --save results/gen
torchrun --nproc_per_node 8 tools/generate.py ...                                                  (8 GPUs)

<save>/generated.jsonl gets a row {"prompt", "gen_answer", "output"} for each prompt of train.jsonl: what the
teacher said, and the gold text apart from it. tools/process_data.py pseudo makes training data of it. An
interrupted run goes on when it is started again, on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from promptkd.cli import program_name
from promptkd.config.options import DecodingSettings, ParallelSettings
from promptkd.config.parser import parse
from promptkd.config.template_options import TemplateSettings
from promptkd.config.values import SPECIAL_TOKENS_HELP, SpecialTokensRule, at_least, option
from promptkd.distributed.device import DeviceSettings
from promptkd.errors import UserError
from promptkd.evaluation.options import given_budget


@dataclass
class GenerationSettings:
    model_path: str = option("", "the teacher: a Hugging Face folder or hub name")
    model_type: str | None = option(None, "the teacher's family, checked against its config.json")
    save: str = option("results/gen", "folder for generated.jsonl")
    overwrite: bool = option(False, "start anew where --save holds answers of other settings")
    seed: int = option(10, "seeds sampling")
    gen_num: int = option(-1, "answer N of the prompts, picked by --seed-ppo; -1: all")
    seed_ppo: int = option(42, "picks the prompts when --gen-num is not -1")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "precision; auto: the DeepSpeed file's, without one bf16 on a GPU, fp32 on a CPU"
    )
    deepspeed_config: str | None = option(None, "DeepSpeed file, for its precision alone: see --dtype")

    def __post_init__(self) -> None:
        if not self.model_path:
            raise UserError("--model-path is missing: name the teacher's folder")
        if not self.save:
            raise UserError("--save is empty: name a folder")
        at_least(0, seed=self.seed, seed_ppo=self.seed_ppo)
        if self.gen_num != -1:
            at_least(1, gen_num=self.gen_num)


@dataclass
class PromptSettings(TemplateSettings):
    data_dir: str = option("", "processed folder with train.jsonl, or the root of such folders")
    data_names: str = option("", "name of the folder below --data-dir, where --data-dir has no train.jsonl itself")
    max_length: int = option(512, "most tokens of prompt and answer together")
    max_prompt_length: int = option(256, "most tokens of a prompt; longer ones are left out")
    eval_batch_size: int | None = option(
        None, "answers of --max-length tokens that are decoded together; default: as many as memory allows"
    )
    special_tokens: SpecialTokensRule = option("auto", SPECIAL_TOKENS_HELP)
    token_budget: int | None = option(
        None, "most padded tokens in one decoding batch; default: --eval-batch-size x --max-length, if that is given"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data_dir:
            raise UserError("--data-dir is missing: name the processed folder whose train.jsonl has the prompts")
        if not 0 < self.max_prompt_length < self.max_length:
            raise UserError(
                f"--max-prompt-length {self.max_prompt_length} leaves no room for an answer within "
                f"--max-length {self.max_length}: lower the first or raise the second"
            )
        self.token_budget = given_budget(self.token_budget, self.eval_batch_size, self.max_length)

    @property
    def file(self) -> str:
        """The training rows in --data-dir or, if they are not there, in the folder of its name."""
        from promptkd.data.row_files import find_rows, is_hub, named_files

        below = [] if is_hub(self.data_dir) else [str(Path(self.data_dir) / self.data_names)]
        found = next((rows for f in [self.data_dir, *below] if (rows := find_rows(f, "train")) is not None), None)
        if found is None:
            others = f", only {names}" if (names := named_files(self.data_dir)) else ""
            raise UserError(
                f"--data-dir {self.data_dir}: there is no train.jsonl{others}: tools/process_data.py makes it"
            )
        return found


def read_settings(argv: list[str]):
    """Settings in groups: generation, device, parallel, data, decoding."""
    groups = {
        "generation": GenerationSettings,
        "device": DeviceSettings,
        "parallel": ParallelSettings,
        "data": PromptSettings,
        "decoding": DecodingSettings,
    }
    return parse(groups, argv, prog=program_name("generate.py"))


def identity(settings, prompts: list[str], dtype: str) -> dict:
    """What decides the answers: a run goes on with earlier ones only where all of this agrees."""
    import hashlib

    from promptkd.utils.files import fingerprint

    what, data = settings.generation, settings.data
    model = what.model_path
    return {
        "model": fingerprint(model)["sha256_of_ends"] if Path(model).is_dir() else model,
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        "dtype": dtype,
        **({"tf32": True} if settings.device.tf32 else {}),  # stores of earlier versions have no such key
        "seed": what.seed,
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "special_tokens": data.special_tokens,
        **({"template_time": data.template_time} if data.template_time else {}),
        **dataclasses.asdict(settings.decoding),
    }


@dataclass
class Prompts:
    """The prompts to answer: texts, token ids and gold texts row by row, and what has to be said of them."""

    texts: list[str]
    ids: list
    gold: list[list[str]]
    notes: list[str]


def read_prompts(settings, tokenizer) -> Prompts:
    """Read the prompts of train.jsonl, as training makes them (promptkd.data.encoding)."""
    import numpy as np

    from promptkd.data.encoding import TextEncoder
    from promptkd.data.prompt_format import PromptFormat, choose_rule, mismatch, template_of_prompts
    from promptkd.data.reading import say_reading
    from promptkd.data.row_counts import RowCounts
    from promptkd.data.row_files import read_rows
    from promptkd.data.templates import template_of
    from promptkd.data.token_check import rule_of_folder

    what, data, file = settings.generation, settings.data, settings.data.file
    rule = rule_of_folder(Path(file).parent, tokenizer, data.special_tokens)
    data.special_tokens = rule or choose_rule("auto", what.model_path)
    encoder, counts = TextEncoder(tokenizer, data.special_tokens), RowCounts()
    raw, render = read_rows(file), template_of(data.template, tokenizer)
    rows = [encoder.read(row, where, render) for where, row in raw]
    say_reading(file, raw)
    made = encoder.pairs([(prompt, "") for prompt, _ in rows])
    kept = [i for i, each in enumerate(made) if counts.take(each, data.max_prompt_length, None)]
    if not kept:
        raise UserError(f"{file}: all prompts are over --max-prompt-length {data.max_prompt_length}: raise it")
    template = template_of_prompts(data.template, encoder, [prompt for prompt, _ in rows])
    unlike = mismatch(PromptFormat(template, data.special_tokens), what.model_path, "--model-path")
    if what.gen_num != -1:
        picked = np.random.default_rng(what.seed_ppo).permutation(len(kept))[: what.gen_num]
        kept = [kept[i] for i in sorted(picked)]
    notes = [str(counts)] * bool(str(counts)) + [f"warning: {unlike}"] * bool(unlike)
    texts, gold = [encoder.text(rows[i][0]) for i in kept], [rows[i][1] for i in kept]
    return Prompts(texts, [made[i].prompt for i in kept], gold, notes)


def run(settings) -> None:
    """Answer what is not answered yet; write generated.jsonl when all is."""
    from promptkd.config.deepspeed import DTYPES
    from promptkd.data.chat_arguments import bind_settings, now
    from promptkd.distributed.ranks import setup
    from promptkd.evaluation.answer_store import AnswerStore, recorded_time
    from promptkd.evaluation.session import choose_dtype
    from promptkd.generation.budget import decoding_budget
    from promptkd.models.loading import check_positions, load_causal_lm, load_config, load_own_tokenizer
    from promptkd.models.tensor_parallel import tensor_parallel_group
    from promptkd.utils.progress import Progress

    what, data = settings.generation, settings.data
    config = load_config(what.model_path, "--model-path")
    tokenizer = load_own_tokenizer(what.model_path, config, "--model-path")
    check_positions(config, data.max_length, "--model-path")
    ranks = setup(settings.parallel.size, settings.device)
    start = None if what.overwrite else recorded_time(Path(what.save))
    bind_settings(tokenizer, data, ranks.world.all_gather_objects([start or now()])[0])
    asked = read_prompts(settings, tokenizer)
    texts, prompts = asked.texts, asked.ids
    dtype = choose_dtype(what.dtype, what.deepspeed_config, ranks.device)
    store = AnswerStore(Path(what.save), identity(settings, texts, dtype), what.overwrite, ranks)
    for note in asked.notes if ranks.is_main else []:
        print(f"generate.py: {note}", file=sys.stderr, flush=True)
    todo = [i for i in range(len(prompts)) if i not in store.answers]
    todo = sorted(todo, key=lambda i: -len(prompts[i]))[ranks.dp_rank :: ranks.dp_size]
    thoughts = 0
    if ranks.all_reduce_max(len(todo)):
        group = tensor_parallel_group(ranks, settings.parallel.size)
        model = load_causal_lm(what.model_path, DTYPES[dtype], "--model-path", what.model_type, group).to(ranks.device)
        data.token_budget = decoding_budget([model], data.max_length, ranks, data.token_budget)
        bar = Progress("generate", len(todo), ranks.is_main, unit="answer")
        thoughts = answer(settings, model, tokenizer, prompts, todo, store, bar)
        bar.close()
    thoughts = sum(ranks.all_gather_objects([thoughts]))  # and every rank has written its last answer
    if ranks.is_main:
        store.finish(
            {"prompt": text, "gen_answer": said, "output": references if len(references) > 1 else references[0]}
            for text, references, said in zip(texts, asked.gold, store.in_order(len(texts)))
        )
        print(f"{len(texts)} answers in {store.file}")
        if thoughts:
            print(f"{thoughts} of the new answers began with thoughts, which are left out")
    ranks.barrier()


def answer(settings, model, tokenizer, prompts: list, todo: list[int], store, bar) -> int:
    """Decode this rank's share batch by batch; an answer depends on its row and the seed, not on batch or rank.

    Returns:
        How many answers began with thoughts, which are left out.
    """
    from promptkd.data.batching import group_by_length
    from promptkd.data.thoughts import answer_text
    from promptkd.generation.answers import without_end
    from promptkd.generation.decode import GenerationRequest, decode
    from promptkd.generation.sampling import Sampling
    from promptkd.models.loading import end_ids

    ends, thoughts = end_ids(tokenizer, model), 0
    data, new_tokens = settings.data, settings.data.max_length - settings.data.max_prompt_length
    for group in group_by_length([len(prompts[i]) + new_tokens for i in todo], data.token_budget):
        rows = [todo[place] for place in group]
        request = GenerationRequest(
            [prompts[row] for row in rows],
            new_tokens,
            ends,
            Sampling(**dataclasses.asdict(settings.decoding)),
            rng_keys=[(settings.generation.seed, row) for row in rows],
        )
        broadcast = store.ranks.broadcast_tp
        responses = decode(model, request, data.token_budget, progress=bar.update, broadcast=broadcast).responses
        said = [
            answer_text(tokenizer, without_end(response.tolist(), ends), prompts[row])
            for row, response in zip(rows, responses)
        ]
        store.add({row: text for row, (text, _) in zip(rows, said)})
        thoughts += sum(thought for _, thought in said)
    return thoughts


def main() -> None:
    run(read_settings(sys.argv[1:]))
