"""Options of evaluate.py, and those that it shares with generate.py. The defaults are the published protocol."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from promptkd.config.options import DataSettings, DecodingSettings, RougeTokenizer, rouge_tokenizer_option
from promptkd.config.values import at_least, option
from promptkd.errors import UserError

DEFAULT_SEED = 10
ANSWER_METRICS = ("rougeL", "exact_match", "length", "cut", "repetition", "distinct", "self_bleu")
REFERENCE_METRICS = ("perplexity", "ece", "kl")


@dataclass
class AnsweringSettings:
    """The model that answers, and its precision."""

    model_path: str = option("", "model that answers: a folder of a model or of a LoRA adapter, or a hub name")
    prompt: str | None = option(
        None, "soft prompt in front of the model's input: a folder in PEFT's format, such as prompt/ of a run"
    )
    model_type: str | None = option(None, "model family, checked against config.json")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "precision. auto: that of the DeepSpeed config, else bf16 on a GPU and fp32 on a CPU"
    )
    deepspeed_config: str | None = option(None, "DeepSpeed config file. Only its precision is used (--dtype auto)")

    def __post_init__(self) -> None:
        if not self.model_path:
            raise UserError("--model-path is missing: name a model's folder")


@dataclass
class EvaluationSettings(AnsweringSettings):
    """The kind of evaluation, its folder and its seeds."""

    type: Literal["eval_main", "exposure_bias"] = option(
        "eval_main", "what to measure. eval_main: ROUGE-L of answers. exposure_bias: excess accumulated error"
    )
    save: str | None = option(None, "output folder (default: results/<type>)")
    overwrite: bool = option(False, "replace existing results in --save")
    seeds: list[int] | None = option(None, "seeds of sampling, evaluated in one run (default: --seed)")
    seed: int | None = option(None, f"single seed of sampling (default: {DEFAULT_SEED})")
    metrics: list[str] | None = option(
        None,
        "what results.json holds with a 95 %% interval. Of the answers: rougeL, exact_match, length, cut (share cut at "
        "the limit), repetition, distinct, self_bleu. Of the model on the references: perplexity, ece, kl (to "
        "--teacher-model-path) (default: those of the answers but self_bleu)",
        choices=(*ANSWER_METRICS, *REFERENCE_METRICS),
        metavar="METRIC",
    )
    answers: str | None = option(
        None, "results folder of evaluate.py. Computes --metrics of its answers again, without a model"
    )
    rouge_tokenizer: RougeTokenizer = rouge_tokenizer_option()

    def __post_init__(self) -> None:
        self._check_metrics()
        if self.answers is None:
            super().__post_init__()
        self.save = f"results/{self.type}" if self.save is None else self.save
        if not self.save:
            raise UserError("--save is empty: name a folder")
        if self.seeds and self.seed is not None:
            raise UserError("--seed and --seeds are both given: leave one out")
        self.seeds = self.seeds or [DEFAULT_SEED if self.seed is None else self.seed]
        self.seed = self.seeds[0]
        at_least(0, seeds=min(self.seeds))
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))}: a seed occurs twice: name each seed once")
        if self.answers is None and "self_bleu" in (self.metrics or ()) and len(self.seeds) < 2:
            raise UserError("--metrics self_bleu compares the answers of several seeds: give two or more --seeds")

    def _check_metrics(self) -> None:
        """Set the default of --metrics, and refuse what does not go together with it or with --answers."""
        of_model = [name for name in self.metrics or () if name in REFERENCE_METRICS]
        if self.type == "exposure_bias" and (self.metrics or self.answers is not None):
            raise UserError("--type exposure_bias scores no answers: leave --metrics and --answers out")
        if self.answers is not None and (self.model_path or self.save is not None):
            raise UserError("--answers needs no model and writes to its own folder: leave --model-path and --save out")
        if self.answers is not None and of_model:
            raise UserError(f"--metrics {of_model[0]} needs the model: leave --answers out, and give --model-path")
        self.metrics = self.metrics or [name for name in ANSWER_METRICS if name != "self_bleu"]


@dataclass
class ExposureBiasSettings:
    """Options of --type exposure_bias."""

    teacher_model_path: str | None = option(None, "teacher, also of --metrics kl: a Hugging Face folder or hub name")
    teacher_prompt: str | None = option(
        None, "soft prompt of the teacher in PEFT's format: the folder prompt/ of a run (default: no soft prompt)"
    )
    sample_times: int | None = option(
        None, "number of answers to each prompt from each model (default: 3, or 1 if greedy)"
    )
    published: bool = option(False, "compute exposure bias as the published code does (docs/fidelity.md)")

    def __post_init__(self) -> None:
        if self.sample_times is not None:
            at_least(1, sample_times=self.sample_times)

    def given(self, allowed: tuple[str, ...] = ()) -> str | None:
        """Return the first option that is not at its default, except for the allowed ones."""
        fields = (field for field in dataclasses.fields(self) if field.name not in allowed)
        values = ((field.name, getattr(self, field.name) != field.default) for field in fields)
        return next(("--" + name.replace("_", "-") for name, changed in values if changed), None)


@dataclass
class BudgetSettings:
    """The size of a decoding batch."""

    eval_batch_size: int | None = option(
        None, "number of answers of --max-length tokens that are decoded together (default: as many as memory allows)"
    )
    token_budget: int | None = option(
        None,
        "maximum number of padded tokens in one decoding batch (default: --eval-batch-size x --max-length, if given)",
    )

    def resolve_budget(self, max_length: int) -> None:
        """Set `token_budget` from --eval-batch-size unless it is given.

        Raises:
            UserError: One of them is under 1.
        """
        for name, value in {"eval_batch_size": self.eval_batch_size, "token_budget": self.token_budget}.items():
            if value is not None:
                at_least(1, **{name: value})
        if self.token_budget is None and self.eval_batch_size is not None:
            self.token_budget = self.eval_batch_size * max_length


@dataclass
class TestSetSettings(BudgetSettings, DataSettings):
    """The test sets and their prompts."""

    data_dir: str = option("data", "folder that holds all test sets, or the folder of one test set with valid.jsonl")
    data_names: str = option(
        "dolly self_inst vicuna sinst uinst",
        "names of the test sets: published ones, or folders below --data-dir",
        nargs="+",
    )
    dev_num: int = option(
        -1, "evaluate on the first N rows of each test set. -1: all rows, but 10,000 of uinst, as published"
    )
    prompt_cut: Literal["end", "start"] = option("end", "side at which prompts longer than --max-prompt-length are cut")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.resolve_budget(self.max_length)
        if self.dev_num < 1 and self.dev_num != -1:
            raise UserError(f"--dev-num {self.dev_num}: give a number of rows, or -1 for all")


@dataclass
class AnswerSettings(DecodingSettings):
    """How answers to test sets are decoded."""

    no_repeat_ngram_size: int = option(6, "no sequence of N tokens occurs twice in prompt and answer. 0: no such rule")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, no_repeat_ngram_size=self.no_repeat_ngram_size)
