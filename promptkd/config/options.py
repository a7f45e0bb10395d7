"""Options: small dataclasses, one field an option, the field's text its help (option_parser.py reads them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from promptkd.config.template_options import TemplateSettings
from promptkd.config.values import SPECIAL_TOKENS_HELP, SpecialTokensRule, at_least, option
from promptkd.errors import UserError

RougeTokenizer = Literal["unicode", "published"]  # see evaluation/rouge_tokenizers.py

# By device. With 4096 the paper's recipes fit its GPUs by tools/plan.py (docs/scale.md).
TOKEN_BUDGET = {"cpu": 2048, "cuda": 4096}


def rouge_tokenizer_option() -> Any:
    """The option that training and evaluation share."""
    return option(
        "unicode",
        "tokens of ROUGE-L: words or characters of any script, or the published a-z and 0-9 only",
        numbers=False,
    )


@dataclass
class RunSettings:
    save: str = option("results/run", "folder for metrics.jsonl, config.json, curves and models", numbers=False)
    overwrite: bool = option(False, "replace what --save already holds", numbers=False)
    resume: Literal["never", "auto", "must"] = option(
        "never",
        "go on from the newest whole checkpoint; auto: start anew where there is none",
        nargs="?",
        const="must",
        numbers=False,
    )
    resume_anyway: bool = option(False, "go on though settings that decide the numbers differ", numbers=False)
    keep_checkpoints: int = option(
        2, "checkpoints to keep; 0: write none. A finished run keeps the last one", numbers=False
    )
    checkpoint_every: int = option(
        0, "write a checkpoint every N optimizer steps; evaluations are followed by one", numbers=False
    )
    checkpoint_minutes: float = option(
        30.0, "write one when the last is M minutes old; 0: leave it to the steps", numbers=False
    )
    skip_nonfinite: int = option(
        0, "drop up to N updates whose loss or gradient is not finite, then stop", numbers=False
    )
    seed: int = option(10, "seeds sampling and dropout")
    seed_order: int = option(0, "seeds the order of the examples")
    log_interval: int = option(
        1, "write a metrics row every N optimizer steps; its times are their means", numbers=False
    )
    profile: bool = option(False, "profile the second step: profile.md and trace.json.gz below --save", numbers=False)
    eval_interval: int = option(
        -1, "evaluate every N optimizer steps; -1: after each epoch, 0: at the end", numbers=False
    )
    eval_gen: bool = option(True, "sample answers for ROUGE-L whenever the dev loss is measured", numbers=False)
    rouge_tokenizer: RougeTokenizer = rouge_tokenizer_option()

    exposure_bias_every: int = option(
        0, "record the student's exposure bias every N steps, first and last; 0: never", numbers=False
    )
    exposure_bias_rows: int = option(
        32, "dev prompts it is measured on, the first ones; an answer from each model", numbers=False
    )

    def __post_init__(self) -> None:
        if not self.save:
            raise UserError("--save is empty: name a folder")
        at_least(1, log_interval=self.log_interval, exposure_bias_rows=self.exposure_bias_rows)
        at_least(-1, eval_interval=self.eval_interval)
        at_least(
            0,
            seed=self.seed,
            seed_order=self.seed_order,
            keep_checkpoints=self.keep_checkpoints,
            checkpoint_every=self.checkpoint_every,
            checkpoint_minutes=self.checkpoint_minutes,
            skip_nonfinite=self.skip_nonfinite,
            exposure_bias_every=self.exposure_bias_every,
        )
        if self.resume != "never" and self.overwrite:
            raise UserError("--resume and --overwrite exclude each other: leave one out")


@dataclass
class ModelSettings:
    model_path: str = option("", "student: a Hugging Face folder or hub name", numbers=False)
    model_type: str | None = option(None, "student's family, checked against its config.json", numbers=False)
    teacher_model_path: str | None = option(None, "teacher: a Hugging Face folder or hub name", numbers=False)
    teacher_dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "the frozen teacher's precision; auto: the DeepSpeed file's"
    )
    teacher_quantization: Literal["none", "8bit", "4bit"] = option(
        "none", "hold the teacher in so many bits a weight, by bitsandbytes (pip install bitsandbytes)"
    )
    gradient_checkpointing: bool = option(False, "less memory: student and prompted teacher recompute activations")

    def __post_init__(self) -> None:
        if not self.model_path:
            raise UserError("--model-path is missing: name the student's folder")


@dataclass
class ParallelSettings:
    model_parallel: bool = option(False, "tensor parallelism: neighbouring ranks hold a model together")
    model_parallel_size: int | None = option(None, "how many ranks do; reads shards in mp<N>/ where no whole model is")

    def __post_init__(self) -> None:
        if self.model_parallel == (self.model_parallel_size is None):
            raise UserError("--model-parallel and --model-parallel-size N go together: give both or neither")
        if self.model_parallel_size is not None:
            at_least(1, model_parallel_size=self.model_parallel_size)

    @property
    def size(self) -> int:
        return self.model_parallel_size or 1


@dataclass
class TrainingParallelSettings(ParallelSettings):
    teacher_model_parallel_size: int | None = option(
        None,
        "the same for the teacher; default: the student's size. All ranks of the larger of the two groups work on "
        "the same examples",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_model_parallel_size is not None:
            if not self.model_parallel:
                raise UserError("--teacher-model-parallel-size needs --model-parallel --model-parallel-size N, be it 1")
            at_least(1, teacher_model_parallel_size=self.teacher_model_parallel_size)
        if self.copies % self.size or self.copies % self.teacher_size:
            raise UserError(
                f"--model-parallel-size {self.size} and --teacher-model-parallel-size {self.teacher_size}: one of "
                "them has to divide the other"
            )

    @property
    def teacher_size(self) -> int:
        return self.teacher_model_parallel_size or self.size

    @property
    def copies(self) -> int:
        """Ranks that work on the same examples."""
        return max(self.size, self.teacher_size)


@dataclass
class DataSettings(TemplateSettings):
    data_dir: str = option(
        "",
        "folder with train_0.bin/.idx or train.jsonl (.json, .csv, .parquet), and valid likewise; or hub:NAME",
        numbers=False,
    )
    max_length: int = option(512, "most tokens of prompt and response together")
    max_prompt_length: int = option(256, "most tokens of a prompt")
    dev_num: int = option(-1, "evaluate on the first N rows of the valid split; -1: all", numbers=False)
    special_tokens: SpecialTokensRule = option("auto", SPECIAL_TOKENS_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(-1, dev_num=self.dev_num)
        if not 0 < self.max_prompt_length < self.max_length:
            raise UserError(
                f"--max-prompt-length {self.max_prompt_length} leaves no room for a response within "
                f"--max-length {self.max_length}: lower the first or raise the second"
            )


@dataclass
class OptimizerSettings:
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)  # AdamW's

    lr: float = option(5e-5, "student's peak learning rate")
    lr_decay_style: Literal["constant", "cosine", "noam"] = option("constant", "schedule of all rates")
    lr_min: float = option(1e-7, "where the cosine schedule ends")
    warmup_iters: int = option(0, "optimizer steps of linear warm-up (constant and noam)")
    weight_decay: float = option(0.01, "AdamW's weight decay; biases and GPT-2's layer norms have none")
    clip_grad: float = option(1.0, "largest gradient norm; 0: no clipping")
    batch_size: int = option(8, "examples per rank and accumulation step")
    gradient_accumulation_steps: int = option(1, "accumulation steps of one optimizer step")
    eval_batch_size: int = option(8, "dev examples per batch", numbers=False)
    epochs: int = option(1, "passes over the training examples")
    total_iters: int | None = option(None, "end after N optimizer steps, whatever --epochs says")
    loss_normalization: Literal["window", "micro-batch"] = option(
        "window", "mean over all response tokens of the step, or the published mean of micro-batch means"
    )
    token_budget: int | None = option(
        None,
        "most padded tokens in one forward pass, for speed and memory alone; "
        f"default: {TOKEN_BUDGET['cpu']}, on a GPU {TOKEN_BUDGET['cuda']}",
    )
    rollout_token_budget: int | None = option(
        None,
        "most tokens (rows x longest prompt and answer) decoded together, in rollouts and evaluations; changes speed "
        "and memory only. Default: what the GPU has free; on a CPU, a key-value cache of 0.5 GB",
        numbers=False,
    )
    deepspeed_config: str | None = option(None, "DeepSpeed file; default: one that suits the device", numbers=False)

    def __post_init__(self) -> None:
        at_least(
            1,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            eval_batch_size=self.eval_batch_size,
            epochs=self.epochs,
        )
        at_least(0, lr=self.lr, lr_min=self.lr_min, weight_decay=self.weight_decay)
        at_least(0, clip_grad=self.clip_grad, warmup_iters=self.warmup_iters)
        for name in ("total_iters", "token_budget", "rollout_token_budget"):
            if getattr(self, name) is not None:
                at_least(1, **{name: getattr(self, name)})


@dataclass
class DecodingSettings:
    do_sample: bool = option(True, "sample; --no-do-sample takes the likeliest token")
    temperature: float = option(1.0, "sampling temperature")
    top_k: int = option(0, "sample among the K likeliest tokens; 0: all")
    top_p: float = option(1.0, "sample among the likeliest tokens that hold this probability; 1: all")

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"--temperature {self.temperature} is not positive; --no-do-sample decodes greedily")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is not a probability above 0 and up to 1")
        at_least(0, top_k=self.top_k)
