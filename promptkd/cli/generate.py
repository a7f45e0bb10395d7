"""Let a model answer the training prompts, for SeqKD and DistiLLM-2.

python tools/generate.py --model-path TEACHER --data-dir processed_data/dolly/full/gpt2 --save results/gen
torchrun --nproc_per_node 8 tools/generate.py ...                                                  (8 GPUs)

<save>/generated.jsonl gets a row {"prompt", "gen_answer", "output"} for each prompt of train.jsonl: the model's
answer and the gold text. tools/process_data.py pseudo turns it into training data. An interrupted run resumes when it
is started again, on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from promptkd.cli import program_name
from promptkd.config.options import DecodingSettings, DeviceSettings, ParallelSettings
from promptkd.config.parser import parse
from promptkd.config.template_options import TemplateSettings
from promptkd.config.values import SPECIAL_TOKENS_HELP, SpecialTokensRule, at_least, option
from promptkd.errors import UserError
from promptkd.evaluation.options import AnsweringSettings, BudgetSettings

if TYPE_CHECKING:
    import numpy as np

    from promptkd.evaluation.answer_store import AnswerStore
    from promptkd.evaluation.session import Session
    from promptkd.models.wrapper import LanguageModel


@dataclass
class GenerationSettings(AnsweringSettings):
    """The folder for the answers, and the prompts to answer."""

    save: str = option("results/gen", "output folder for generated.jsonl")
    overwrite: bool = option(False, "replace answers in --save that were generated with other options")
    seed: int = option(10, "seed of sampling")
    gen_num: int = option(-1, "number of prompts to answer, chosen at random. -1: all")
    seed_ppo: int = option(42, "seed of the choice of prompts by --gen-num")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.save:
            raise UserError("--save is empty: name a folder")
        at_least(0, seed=self.seed, seed_ppo=self.seed_ppo)
        if self.gen_num != -1:
            at_least(1, gen_num=self.gen_num)


@dataclass
class PromptSettings(BudgetSettings, TemplateSettings):
    """The data folder and its prompts."""

    data_dir: str = option("", "folder with train.jsonl (.json, .csv, .parquet), its parent folder, or hub:NAME")
    data_names: str = option("", "name of the folder below --data-dir, if --data-dir has no train.jsonl")
    max_length: int = option(512, "maximum number of tokens of prompt and answer together")
    max_prompt_length: int = option(256, "maximum number of tokens of a prompt. Longer prompts are dropped")
    special_tokens: SpecialTokensRule = option("auto", SPECIAL_TOKENS_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data_dir:
            raise UserError("--data-dir is missing: name the processed folder whose train.jsonl has the prompts")
        if not 0 < self.max_prompt_length < self.max_length:
            raise UserError(
                f"--max-prompt-length {self.max_prompt_length} leaves no room for an answer within "
                f"--max-length {self.max_length}: lower the first or raise the second"
            )
        self.resolve_budget(self.max_length)

    @property
    def file(self) -> str:
        """Return the training rows in --data-dir, or in its folder of the name that --data-names gives."""
        from promptkd.data.row_files import find_rows, is_hub, named_files

        below = [] if is_hub(self.data_dir) else [str(Path(self.data_dir) / self.data_names)]
        found = next((rows for f in [self.data_dir, *below] if (rows := find_rows(f, "train")) is not None), None)
        if found is None:
            others = f", only {names}" if (names := named_files(self.data_dir)) else ""
            raise UserError(
                f"--data-dir {self.data_dir}: there is no train.jsonl{others}: tools/process_data.py makes it"
            )
        return found


def read_settings(argv: list[str]) -> SimpleNamespace:
    """Return the settings in groups: generation, device, parallel, data, decoding."""
    groups = {
        "generation": GenerationSettings,
        "device": DeviceSettings,
        "parallel": ParallelSettings,
        "data": PromptSettings,
        "decoding": DecodingSettings,
    }
    return parse(groups, argv, prog=program_name("generate.py"), description=__doc__)


def identity(settings: SimpleNamespace, prompts: list[str], dtype: str) -> dict[str, Any]:
    """Return everything that the answers depend on. A run resumes only where all of it agrees."""
    import hashlib

    from promptkd.models.adapters import base_of
    from promptkd.utils.files import fingerprint

    options, data = settings.generation, settings.data
    model, base = options.model_path, base_of(options.model_path, "--model-path")
    folders = {"model": model, "base": None if base == model else base, "prompt": options.prompt}
    # Records of earlier versions have none of the keys that are optional here.
    return {
        **{
            name: fingerprint(path)["sha256_of_ends"] if Path(path).is_dir() else path
            for name, path in folders.items()
            if path is not None
        },
        "prompts": hashlib.sha256("\0".join(prompts).encode()).hexdigest(),
        "dtype": dtype,
        **({"tf32": True} if settings.device.tf32 else {}),
        "seed": options.seed,
        "max_length": data.max_length,
        "max_prompt_length": data.max_prompt_length,
        "special_tokens": data.special_tokens,
        **({"template_time": data.template_time} if data.template_time else {}),
        **dataclasses.asdict(settings.decoding),
    }


@dataclass
class Prompts:
    """The prompts to answer, and notes on them for the user.

    Attributes:
        texts: The text of each prompt.
        ids: The token ids of each prompt.
        gold: The gold texts of each prompt.
        notes: What the user should know about them.
    """

    texts: list[str]
    ids: list[np.ndarray]
    gold: list[list[str]]
    notes: list[str]


def read_prompts(settings: SimpleNamespace, tokenizer: Any) -> Prompts:
    """Read the prompts of train.jsonl in the form that training gives them (promptkd.data.encoding)."""
    import numpy as np

    from promptkd.data.encoding import RowCounts, TextEncoder
    from promptkd.data.prompt_format import PromptFormat, choose_rule, mismatch, rule_of_folder, template_of_prompts

    options, data, file = settings.generation, settings.data, settings.data.file
    rule = rule_of_folder(Path(file).parent, tokenizer, data.special_tokens)
    data.special_tokens = rule or choose_rule("auto", options.model_path)
    encoder, counts = TextEncoder(tokenizer, data.special_tokens), RowCounts()
    rows = encoder.read_source(file, data.template)
    made = encoder.pairs([(row.prompt, "") for row in rows])
    kept = [i for i, each in enumerate(made) if counts.take(each, data.max_prompt_length, None)]
    if not kept:
        raise UserError(f"{file}: all prompts are over --max-prompt-length {data.max_prompt_length}: raise it")
    template = template_of_prompts(data.template, encoder, [row.prompt for row in rows])
    warning = mismatch(PromptFormat(template, data.special_tokens), options.model_path, "--model-path")
    if options.gen_num != -1:
        order = np.random.default_rng(options.seed_ppo).permutation(len(kept))[: options.gen_num]
        kept = [kept[i] for i in sorted(order)]
    notes = [str(counts)] * bool(str(counts)) + [f"warning: {warning}"] * bool(warning)
    texts, gold = [encoder.specials.unmark(rows[i].prompt) for i in kept], [rows[i].references for i in kept]
    return Prompts(texts, [made[i].prompt for i in kept], gold, notes)


def run(settings: SimpleNamespace) -> None:
    """Answer the prompts that have no answer yet. Write generated.jsonl when all have one."""
    from promptkd.evaluation.answer_store import AnswerStore, recorded_time
    from promptkd.evaluation.session import open_session

    options = settings.generation
    folder = Path(options.save)
    time = None if options.overwrite else recorded_time(folder)
    session = open_session("generate.py", settings, options, {"--model-path": options.model_path}, time)
    ranks = session.ranks
    prompts = read_prompts(settings, session.tokenizer)
    store = AnswerStore(folder, identity(settings, prompts.texts, session.dtype), options.overwrite, ranks)
    answering = None if store.is_complete(len(prompts.ids)) else session.load_answering(options)
    store.begin()  # now: a model that cannot be read has left earlier answers in place
    session.print_notes(prompts.notes)
    thoughts = 0 if answering is None else answer(session, answering, prompts.ids, store)
    thoughts = sum(ranks.all_gather_objects([thoughts]))  # every rank has written its last answer by now
    if ranks.is_main:
        answers = store.in_order(len(prompts.texts))
        store.finish(
            {"prompt": text, "gen_answer": answer_text, "output": gold if len(gold) > 1 else gold[0]}
            for text, gold, answer_text in zip(prompts.texts, prompts.gold, answers)
        )
        print(f"{len(answers)} answers in {store.file}")
        if thoughts:
            print(f"{thoughts} of the new answers began with thoughts, which are left out")
    ranks.barrier()


def answer(session: Session, answering: LanguageModel, prompts: list[np.ndarray], store: AnswerStore) -> int:
    """Let a model answer this rank's share of the prompts that have no answer yet, and store each batch.

    Returns:
        How many answers began with thoughts, which are left out.
    """
    from promptkd.data.thoughts import answer_text
    from promptkd.generation.answers import decode_share
    from promptkd.generation.sampling import Sampling
    from promptkd.models.loading import end_ids
    from promptkd.utils.progress import Progress

    settings, ranks, tokenizer = session.settings, session.ranks, session.tokenizer
    pending = [i for i in range(len(prompts)) if i not in store.answers]
    pending = sorted(pending, key=lambda i: -len(prompts[i]))[ranks.dp_rank :: ranks.dp_size]
    options, data = settings.generation, settings.data
    session.choose_token_budget(answering)
    model = answering.model
    bar, thoughts = Progress("generate", len(pending), ranks.is_main, unit="answer"), 0
    batches = decode_share(
        model,
        prompts,
        [options.seed],
        end_ids=end_ids(tokenizer, model),
        max_new_tokens=data.max_length - data.max_prompt_length,
        sampling=Sampling(**dataclasses.asdict(settings.decoding)),
        token_budget=data.token_budget,
        ranks=ranks,
        progress=bar.update,
        pairs=[(0, i) for i in pending],
        prefix=answering.prefix,
    )
    for batch in batches:
        texts = {index: answer_text(tokenizer, ids, prompts[index]) for _, index, ids in batch}
        store.add({index: text for index, (text, _) in texts.items()})
        thoughts += sum(thought for _, thought in texts.values())
    bar.close()
    return thoughts


def main() -> None:
    """Run the command."""
    run(read_settings(sys.argv[1:]))
