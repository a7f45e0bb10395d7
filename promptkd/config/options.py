"""Options as dataclasses: one field for each option (`promptkd.config.parser` builds the command line)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from promptkd.config.template_options import TemplateSettings
from promptkd.config.values import SPECIAL_TOKENS_HELP, SpecialTokensRule, at_least, option
from promptkd.errors import UserError

RougeTokenizer = Literal["unicode", "published"]  # see evaluation/rouge_tokenizers.py

# Padded tokens in one forward pass, by device. With 4096 the paper's recipes fit its GPUs (docs/distributed.md).
TOKEN_BUDGET = {"cpu": 2048, "cuda": 4096}


def rouge_tokenizer_option() -> Any:
    """Return the field of an option that training and evaluation share."""
    return option(
        "unicode",
        "tokens of ROUGE-L: words or characters of any script, or the published a-z and 0-9 only",
        numbers=False,
        published=True,
    )


@dataclass
class RunSettings:
    save: str = option("results/run", "output folder for metrics.jsonl, config.json, curves and models", numbers=False)
    overwrite: bool = option(False, "replace an existing run in --save", numbers=False)
    resume: Literal["never", "auto", "must"] = option(
        "never",
        "continue from the newest valid checkpoint. auto: start a new run if there is none. must, or no value: "
        "require one",
        nargs="?",
        const="must",
        numbers=False,
    )
    resume_anyway: bool = option(False, "resume even if options that change the results differ", numbers=False)
    keep_checkpoints: int = option(
        2, "number of checkpoints to keep. 0 writes none. A finished run keeps its last one", numbers=False
    )
    checkpoint_every: int = option(
        0,
        "write a checkpoint every N optimizer steps, in addition to one after each evaluation. 0: never",
        numbers=False,
    )
    checkpoint_minutes: float = option(
        30.0, "write a checkpoint when the last one is M minutes old. 0 disables this", numbers=False
    )
    skip_nonfinite: int = option(
        0, "skip up to N updates whose loss or gradient is not finite, then stop", numbers=False
    )
    seed: int = option(10, "seed of sampling and dropout")
    seed_order: int = option(0, "seed of the order of examples")
    log_interval: int = option(
        1, "write a metrics row every N optimizer steps, with the mean times of these steps", numbers=False
    )
    profile: bool = option(
        False, "profile the second step and write profile.md and trace.json.gz to --save", numbers=False
    )
    eval_interval: int = option(
        -1, "evaluate every N optimizer steps. -1: after each epoch. 0: at the end only", numbers=False
    )
    eval_gen: bool = option(True, "generate answers and score them by ROUGE-L at each evaluation", numbers=False)
    curves: bool = option(True, "draw curves.png after each evaluation", numbers=False)
    rouge_tokenizer: RougeTokenizer = rouge_tokenizer_option()

    exposure_bias_every: int = option(
        0, "measure the student's exposure bias before training, every N steps, and at the end. 0: never", numbers=False
    )
    exposure_bias_rows: int = option(
        32, "number of dev prompts for --exposure-bias-every; student and teacher answer each once", numbers=False
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
class DeviceSettings:
    """Options that decide how a device computes."""

    tf32: bool = option(False, "compute float32 matrix products on a GPU in TF32: faster, with 10 bits of mantissa")
    deterministic: bool = option(
        False, "use deterministic algorithms only. On a GPU the same run then gives the same bits, but is slower"
    )


@dataclass
class ModelSettings:
    model_path: str = option("", "student: a Hugging Face folder or hub name", numbers=False)
    model_type: str | None = option(
        None, "student's model family, checked against its config.json", numbers=False, published=True
    )
    teacher_model_path: str | None = option(None, "teacher: a Hugging Face folder or hub name", numbers=False)
    teacher_dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "precision of the frozen teacher. auto: that of the DeepSpeed config"
    )
    teacher_quantization: Literal["none", "8bit", "4bit"] = option(
        "none", "quantize the teacher's weights with bitsandbytes (pip install bitsandbytes)"
    )
    teacher_deepspeed_config: str | None = option(
        None,
        "DeepSpeed config of the teacher's engine, such as one with ZeRO-3 (default: the student's)",
        numbers=False,
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations of student and prompted teacher in the backward pass, to save memory"
    )

    def __post_init__(self) -> None:
        if not self.model_path:
            raise UserError("--model-path is missing: name the student's folder")


@dataclass
class ParallelSettings:
    model_parallel: bool = option(False, "tensor parallelism: partition each model over neighboring ranks")
    model_parallel_size: int | None = option(
        None, "number of ranks that share one model. Shards are read from mp<N>/ if the folder has no complete model"
    )

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
        "number of ranks that share the teacher. The ranks of the larger of the two groups process the same examples "
        "(default: --model-parallel-size)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_model_parallel_size is not None:
            if not self.model_parallel:
                raise UserError(
                    "--teacher-model-parallel-size needs --model-parallel --model-parallel-size N: N may be 1"
                )
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
        """Number of ranks that process the same examples."""
        return max(self.size, self.teacher_size)


@dataclass
class DataSettings(TemplateSettings):
    data_dir: str = option(
        "",
        "folder with train_0.bin/.idx or train.jsonl (.json, .csv, .parquet) and the same for valid, or hub:NAME",
        numbers=False,
    )
    max_length: int = option(512, "maximum number of tokens of prompt and response together")
    max_prompt_length: int = option(256, "maximum number of tokens of a prompt")
    dev_num: int = option(
        -1, "evaluate on the first N rows of the valid split. -1: all rows. 0: no evaluation", numbers=False
    )
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

    lr: float = option(5e-5, "peak learning rate of the student")
    lr_decay_style: Literal["constant", "cosine", "noam", "cosine_trm"] = option(
        "constant", "learning-rate schedule of student and prompt. cosine_trm is transformers' cosine, with warmup"
    )
    lr_min: float = option(1e-7, "final learning rate of the cosine schedule")
    warmup_iters: int = option(0, "optimizer steps of linear warmup, for the schedules constant and noam")
    weight_decay: float = option(0.01, "weight decay of AdamW. Biases and GPT-2's layer norms are not decayed")
    clip_grad: float = option(1.0, "maximum gradient norm. 0 disables clipping")
    batch_size: int = option(8, "examples per data-parallel rank and accumulation step")
    gradient_accumulation_steps: int = option(1, "accumulation steps per optimizer step")
    eval_batch_size: int = option(8, "dev examples per batch", numbers=False)
    epochs: int = option(1, "passes over the training examples")
    total_iters: int | None = option(None, "stop after N optimizer steps; overrides --epochs")
    loss_normalization: Literal["window", "micro-batch"] = option(
        "window",
        "window: mean over all response tokens of the step. micro-batch: mean of the means of accumulation steps",
        published=True,
    )
    token_budget: int | None = option(
        None,
        "maximum number of padded tokens in one forward pass. It affects speed and memory only "
        f"(default: {TOKEN_BUDGET['cuda']} on a GPU, {TOKEN_BUDGET['cpu']} on a CPU)",
    )
    rollout_token_budget: int | None = option(
        None,
        "maximum number of tokens (rows x longest prompt and answer) that are decoded together. It affects speed and "
        "memory only (default: at most half of a GPU's free memory, or a key-value cache of 0.5 GB on a CPU)",
        numbers=False,
    )
    deepspeed_config: str | None = option(
        None,
        "DeepSpeed config file (default: bf16 or fp16 with ZeRO-1 on a GPU, fp32 without ZeRO on a CPU)",
        numbers=False,
    )

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
    do_sample: bool = option(True, "sample responses. --no-do-sample decodes greedily")
    temperature: float = option(1.0, "sampling temperature")
    top_k: int = option(0, "sample from the K most likely tokens. 0: from all")
    top_p: float = option(1.0, "sample from the most likely tokens that have this total probability. 1: from all")

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"--temperature {self.temperature} is not positive; --no-do-sample decodes greedily")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is not a probability above 0 and up to 1")
        at_least(0, top_k=self.top_k)
