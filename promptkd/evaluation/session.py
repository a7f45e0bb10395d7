"""The procedure that ROUGE-L, exposure bias and answers for SeqKD share: everything is checked before it is written."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from promptkd.config.deepspeed import DTYPES, precision, read_deepspeed_config
from promptkd.data.prompt_format import choose_rule
from promptkd.data.templates import bind_settings, now
from promptkd.distributed.device import peak_memory_gb
from promptkd.distributed.ranks import Ranks, setup
from promptkd.errors import UserError
from promptkd.evaluation.options import REFERENCE_METRICS, AnsweringSettings
from promptkd.evaluation.test_sets import Missing, TestSet, find_sets, notes_on_sets, read_set
from promptkd.generation.budget import decoding_budget
from promptkd.models.adapters import base_of
from promptkd.models.loading import check_positions, load_causal_lm, load_config, load_own_tokenizer
from promptkd.models.soft_prompt import SoftPrompt, load_prompt
from promptkd.models.tensor_parallel import TensorParallelGroup, tensor_parallel_group
from promptkd.models.wrapper import LanguageModel
from promptkd.utils.files import fingerprint, write_json, write_text

RESULTS = "results.json"


@dataclass
class Session:
    """What a command needs to let models answer.

    Attributes:
        program: The command's name, for messages.
        settings: The command's settings.
        models: Option -> folder or hub name of the model, the answering one first.
        ranks: The ranks that share the work.
        group: The ranks that hold a model together.
        tokenizer: The answering model's tokenizer.
        dtype: Name of the precision.
        sets: The test sets, of evaluations.
        missing: The test sets that do not exist.
    """

    program: str
    settings: SimpleNamespace
    models: dict[str, str]
    ranks: Ranks
    group: TensorParallelGroup | None
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    sets: list[TestSet] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def load(self, option: str, model_type: str | None = None) -> PreTrainedModel:
        """Load the model that an option names to this rank's device, in eval mode."""
        model = load_causal_lm(self.models[option], DTYPES[self.dtype], option, model_type, self.group)
        return model.to(self.ranks.device)  # type: ignore[arg-type]  # transformers decorates `to`

    def load_prompt(self, folder: str | None, model: PreTrainedModel, option: str) -> SoftPrompt | None:
        """Read the soft prompt of the model that `option` names, if a folder is given."""
        if folder is None:
            return None
        embedding: Any = model.get_input_embeddings()
        prompt = SoftPrompt(load_prompt(Path(folder), embedding.weight.size(1)))
        check_positions(model.config, self.settings.data.max_length + len(prompt), option)
        return prompt

    def load_answering(self, options: AnsweringSettings) -> LanguageModel:
        """Load the answering model and its soft prompt."""
        model = self.load("--model-path", options.model_type)
        prompt = self.load_prompt(options.prompt, model, "--model-path")
        return LanguageModel(model, prompt).to(self.ranks.device)

    def choose_token_budget(self, model: LanguageModel) -> None:
        """Resolve the token budget of the batches that the model decodes."""
        data = self.settings.data
        length = data.max_length + (0 if model.prompt is None else len(model.prompt))
        data.token_budget = decoding_budget([model.model], length, self.ranks, data.token_budget)

    def print_notes(self, notes: list[str]) -> None:
        """Print lines to stderr, once."""
        for note in notes if self.ranks.is_main else []:
            print(f"{self.program}: {note}", file=sys.stderr, flush=True)

    def begin(self) -> dict[str, Any]:
        """Claim --save and print notes on the test sets. Return results.json without the sets' results."""
        claim(Path(self.settings.evaluation.save), self.ranks)
        self.print_notes(notes_on_sets(self.sets, dict(self.models)))
        return _header(self)

    def finish(self, results: dict[str, Any], markdown: str) -> None:
        """Write and print the results."""
        folder = Path(self.settings.evaluation.save)
        if self.ranks.is_main:
            results["run"]["peak_memory_gb"] = round(peak_memory_gb(self.ranks.device), 3)
            write_text(folder / "results.md", markdown)
            write_json(folder / RESULTS, results)
            print(f"{markdown}\nwritten to {folder}/")
        self.ranks.barrier()


def open_session(
    program: str, settings: SimpleNamespace, options: AnsweringSettings, models: dict[str, str], time: str | None = None
) -> Session:
    """Check the models' configurations, load the tokenizer, and meet the other ranks.

    Args:
        program: The command's name.
        settings: The command's settings.
        options: The settings' group about the model that answers.
        models: Option -> folder or hub name of the model.
        time: The time in chat templates. None for the present.
    """
    configs = {option: load_config(path, option) for option, path in models.items()}
    for option, config in configs.items():
        check_positions(config, settings.data.max_length, option)
    tokenizer = load_own_tokenizer(options.model_path, configs["--model-path"], "--model-path")
    ranks = setup(settings.parallel.size, settings.device)
    bind_settings(tokenizer, settings.data, ranks.world.all_gather_objects([time or now()])[0])
    dtype = choose_dtype(options.dtype, options.deepspeed_config, ranks.device)
    group = tensor_parallel_group(ranks, settings.parallel.size)
    return Session(program, settings, models, ranks, group, tokenizer, dtype)


def open_evaluation(settings: SimpleNamespace, models: dict[str, str]) -> Session:
    """Open a session with the test sets that --data-names lists.

    Raises:
        UserError: --save holds results, no test set exists, or one is broken.
    """
    check_save(Path(settings.evaluation.save), settings.evaluation.overwrite)
    data = settings.data
    files, missing = find_sets(data.data_dir, data.data_names.split())
    session = open_session("evaluate.py", settings, settings.evaluation, models)
    data.special_tokens = choose_rule(data.special_tokens, *models.values())
    reading = data.max_prompt_length, data.dev_num, data.prompt_cut == "start", data.template, data.special_tokens
    length = data.max_length if set(settings.evaluation.metrics) & set(REFERENCE_METRICS) else None
    session.sets = [read_set(name, path, session.tokenizer, *reading, length) for name, path in files.items()]
    session.missing = missing
    session.print_notes([f"warning: {each}" for each in missing])
    return session


def _header(session: Session) -> dict[str, Any]:
    """Return results.json without the sets' results.

    Where results are compared, `protocol` has to agree, except for `dev_num`: there the rows have to.
    """
    settings = session.settings
    options, data = settings.evaluation, settings.data
    return {
        "type": options.type,
        "model": describe_model(options.model_path, options.prompt),
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
        "seeds": options.seeds,
        "run": {
            "dtype": session.dtype,
            "device": session.ranks.device.type,
            **dataclasses.asdict(settings.device),
            "ranks": session.ranks.world.dp_size,
            "token_budget": data.token_budget,
            "template_time": data.template_time,
        },
        "missing": [dataclasses.asdict(each) for each in session.missing],
        "sets": {},
    }


def describe_model(path: str, prompt: str | None = None) -> dict[str, Any]:
    """Describe a model for the record, with an adapter's base model and a soft prompt where there are."""
    further = {"base": base_of(path, "--model-path"), "prompt": prompt}
    parts = {name: describe_folder(each) for name, each in further.items() if each is not None and each != path}
    return describe_folder(path) | parts


def describe_folder(path: str) -> dict[str, Any]:
    """Return a path and the fingerprint of the folder, or None for a hub name."""
    return {"path": path, "fingerprint": fingerprint(path) if Path(path).is_dir() else None}


def choose_dtype(name: str, deepspeed_config: str | None, device: torch.device) -> str:
    """Return the precision that --dtype names.

    "auto" is the DeepSpeed file's precision. Without a file it is bf16 on a GPU that has it, fp16 on others, and fp32
    on a CPU.

    Raises:
        UserError: fp16 on a CPU, or a DeepSpeed file that training would refuse.
    """
    if name == "auto":
        return precision(read_deepspeed_config(deepspeed_config, device))
    if name == "fp16" and device.type == "cpu":
        raise UserError("--dtype fp16 needs a GPU: use fp32 or bf16 on a CPU")
    return name


def check_save(folder: Path, overwrite: bool) -> None:
    """Raise UserError where the folder holds results already, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save {folder} is a file: name a folder")
    if (folder / RESULTS).exists() and not overwrite:
        raise UserError(
            f"--save {folder} already holds results: --overwrite replaces them, --save names another folder"
        )


def claim(folder: Path, ranks: Ranks) -> None:
    """Create the folder and remove an earlier evaluation's files from it. All ranks wait for that."""
    ranks.barrier()  # every rank has looked for earlier results by now
    if ranks.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save {folder} cannot be created ({error.strerror}): name another folder") from None
        # exposure_bias/ is not a test set's folder but holds another evaluation, see tools/report.py.
        curves = [path for path in folder.glob("*/exposure_bias.*") if path.parent.name != "exposure_bias"]
        answers = folder.glob("*/seed*/answers.jsonl")
        curves += [*folder.glob("exposure_bias.*"), *folder.glob("*/reliability.png")]
        for path in [folder / RESULTS, folder / "results.md", *answers, *curves]:
            path.unlink(missing_ok=True)
    ranks.barrier()
