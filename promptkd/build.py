"""From settings to a trainer: everything is read and checked before anything is written."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import torch

from promptkd.checkpoint import claim_folder, describe_run, write_json
from promptkd.data.examples import ExampleSet
from promptkd.data.windows import Windows
from promptkd.devset import DevSet
from promptkd.distributed import Ranks, setup
from promptkd.engine import DTYPES, Learner, Optimization, precision, read_deepspeed_config, with_precision
from promptkd.errors import UserError
from promptkd.methods import method_class
from promptkd.methods.base import Context, Limits, Method
from promptkd.models import (
    LanguageModel,
    check_pair,
    check_positions,
    load_causal_lm,
    load_config,
    load_tokenizer,
)
from promptkd.rollout import Sampling
from promptkd.settings import flat
from promptkd.trainer import Trainer, total_steps

TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}


def build_trainer(settings: SimpleNamespace) -> Trainer:
    """Read models and data, check that they fit together, claim the folder, start the engines."""
    ranks = setup()
    config = read_deepspeed_config(settings.optimizer.deepspeed_config, ranks.device)
    tokenizer = load_student_tokenizer(settings)
    examples, dev = load_data(settings.data, tokenizer)
    windows = make_windows(settings, len(examples), ranks)
    student, teacher = load_models(settings, config, tokenizer)
    if ranks.first:
        folder = claim_folder(settings.run.save, settings.run.overwrite)
    ranks.barrier()
    folder = claim_folder(settings.run.save, False) if not ranks.first else folder

    method = build_method(settings, config, student, teacher, tokenizer, windows, ranks)
    if ranks.first:
        inputs = {
            "student": settings.models.model_path,
            "teacher": settings.models.teacher_model_path,
            "data": settings.data.data_dir,
        }
        groups = {k: v for k, v in vars(settings).items() if dataclasses.is_dataclass(v)}
        write_json(folder / "config.json", describe_run({"method": settings.method, **flat(groups)}, inputs))
    context, published = method.context, method.context.published_mean
    devset = DevSet(
        dev, tokenizer, context.sampling, context.limits,
        settings.optimizer.eval_batch_size, settings.run.seed, ranks, published,
    )  # fmt: skip
    return Trainer(settings, method, examples, windows, devset, ranks, folder)


def load_student_tokenizer(settings: SimpleNamespace):
    load_config(settings.models.model_path, "--model-path")  # the clearer message where the folder is missing
    return load_tokenizer(settings.models.model_path)


def load_data(data, tokenizer) -> tuple[ExampleSet, ExampleSet | None]:
    """Training examples, and dev examples unless --dev-num is 0."""
    if not data.data_dir:
        raise UserError("--data-dir is missing: name a folder with train_0.bin/.idx or train.jsonl")
    sizes = (tokenizer, data.max_prompt_length, data.max_length)
    train = ExampleSet.open(data.data_dir, "train", *sizes)
    return train, ExampleSet.open(data.data_dir, "valid", *sizes, limit=data.dev_num) if data.dev_num else None


def make_windows(settings: SimpleNamespace, examples: int, ranks: Ranks) -> Windows:
    how = settings.optimizer
    return Windows(
        examples, how.batch_size, how.gradient_accumulation_steps, ranks.size, ranks.rank,
        seed=settings.run.seed_order, published=how.loss_normalization == "micro-batch",
    )  # fmt: skip


def load_models(settings: SimpleNamespace, config: dict, tokenizer):
    """Student, and teacher if the method needs one, checked against each other."""
    models, data = settings.models, settings.data
    wants_teacher = method_class(settings.method).needs_teacher
    if wants_teacher and not models.teacher_model_path:
        raise UserError(f"--method {settings.method} needs --teacher-model-path: name the teacher's folder")
    if not wants_teacher and models.teacher_model_path:
        raise UserError(f"--method {settings.method} has no teacher: leave --teacher-model-path out")
    # Master weights are float32 whatever the engine computes in.
    student = load_causal_lm(models.model_path, torch.float32, "--model-path", models.model_type)
    check_positions(student.config, data.max_length, "--model-path")
    if models.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    if not wants_teacher:
        return student, None
    dtype = DTYPES[teacher_precision(models, config)]
    teacher = load_causal_lm(models.teacher_model_path, dtype, "--teacher-model-path")
    check_positions(teacher.config, data.max_length, "--teacher-model-path")
    check_pair(student, teacher, tokenizer, load_tokenizer(models.teacher_model_path))
    return student, teacher


def teacher_precision(models, config: dict) -> str:
    return precision(config) if models.teacher_dtype == "auto" else models.teacher_dtype


def build_method(settings, config, student, teacher, tokenizer, windows: Windows, ranks: Ranks) -> Method:
    """Start the student's engine and make the method, which starts the teacher's if it trains something there."""
    how, decoding, data = settings.optimizer, settings.decoding, settings.data
    optimization = Optimization(
        how.lr, total_steps(how, windows), how.lr_decay_style, how.lr_min,
        how.warmup_iters, how.weight_decay, how.clip_grad,
    )  # fmt: skip
    teacher_config = with_precision(config, teacher_precision(settings.models, config))
    context = Context(
        student=Learner(LanguageModel(student), optimization, config, ranks),
        teacher=teacher,
        tokenizer=tokenizer,
        ranks=ranks,
        limits=Limits(data.max_length, data.max_prompt_length, how.token_budget or TOKEN_BUDGET[ranks.device.type]),
        sampling=Sampling(decoding.do_sample, decoding.temperature, decoding.top_k, decoding.top_p),
        seed=settings.run.seed,
        optimization=optimization,
        learner=lambda model, optimization: Learner(model, optimization, teacher_config, ranks),
        published_mean=how.loss_normalization == "micro-batch",
    )
    return method_class(settings.method)(context, settings.method_settings)
