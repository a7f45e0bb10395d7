"""From settings to a trainer: everything is read and checked before anything is written."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from promptkd.checkpointing.fingerprint import RunFingerprint
from promptkd.checkpointing.manager import Checkpoints, recorded_time, select_checkpoint
from promptkd.config.deepspeed import (
    DTYPES,
    check_with_deepspeed,
    precision,
    read_deepspeed_config,
    with_precision,
    zero_stage,
)
from promptkd.config.options import TOKEN_BUDGET
from promptkd.config.parser import declared_options, flat
from promptkd.data.chat_arguments import bind_settings, now
from promptkd.data.dataset import vocabulary_size
from promptkd.data.prompt_format import mismatch
from promptkd.data.sampler import StepSampler
from promptkd.distributed.ranks import Ranks, setup
from promptkd.engine.engine import TrainEngine
from promptkd.engine.optim import OptimizerConfig
from promptkd.errors import UserError
from promptkd.generation.sampling import Sampling
from promptkd.methods.base import Data, LengthLimits, Method, MethodContext
from promptkd.methods.registry import method_class
from promptkd.models.adapters import base_of, is_adapter
from promptkd.models.loading import (
    check_pair,
    check_positions,
    count_parameters,
    end_ids,
    load_causal_lm,
    load_config,
    load_own_tokenizer,
    load_tokenizer,
)
from promptkd.models.quantization import check_quantization, loading_options
from promptkd.models.tensor_parallel import TensorParallelGroup, tensor_parallel_group
from promptkd.models.vocabulary import SharedVocabulary
from promptkd.models.wrapper import LanguageModel
from promptkd.training.run_folder import check_vacant, clear_folder, describe_run
from promptkd.training.trainer import Trainer, total_steps
from promptkd.training.validation import DevSet
from promptkd.utils.files import lock_folder, write_json

TEACHER_FILE = "--teacher-deepspeed-config"


def build_trainer(settings: SimpleNamespace) -> Trainer:
    """Read models and data, check that they fit together, claim the folder, start the engines."""
    ranks = setup(settings.parallel.copies, settings.device)
    config = read_deepspeed_config(settings.optimizer.deepspeed_config, ranks.device)
    check_with_deepspeed(config, settings.optimizer.deepspeed_config, ranks.device)
    teacher_config = read_teacher_config(settings, config, ranks)
    kind = method_class(settings.method)
    check_quantization(settings, teacher_stage(kind, teacher_config))
    groups = tensor_groups(settings, max(map(zero_stage, (config, teacher_config))), ranks)
    path = settings.models.model_path
    tokenizer = load_own_tokenizer(path, load_config(path, "--model-path"), "--model-path")
    recorded = recorded_time(Path(settings.run.save)) if settings.run.resume != "never" else None
    bind_settings(tokenizer, settings.data, ranks.world.all_gather_objects([recorded or now()])[0])
    data = kind.open_data(settings, tokenizer)
    if settings.run.eval_gen and data.dev is not None and data.dev.references is None:
        raise UserError("the dev set has no reference texts (valid.jsonl): add it or pass --no-eval-gen")
    windows = kind.make_sampler(settings, data, ranks)
    check_exposure_bias(settings, data)
    student, teacher, shared = load_models(settings, teacher_config, tokenizer, groups, ranks)
    check_data(settings, shared, data, tokenizer)
    own_file = getattr(settings.method_settings, "teacher_deepspeed_config", None) is not None
    both = {**config, "teacher": teacher_config} if own_file else config
    checkpoints, described = open_folder(settings, both, data.folders, ranks)
    try:
        configs, models = (config, teacher_config), (student, teacher, shared)
        method = build_method(settings, configs, models, tokenizer, data, windows, ranks)
        say_shared(method.context, described)
        if checkpoints.start is not None:
            checkpoints.load(method)
        described |= {
            "parameters": parameters_of(settings, method.prompt()),
            "rows": {name: each.record() for name, each in data.sets().items()},
        }
        begin_files(checkpoints, described)
    except BaseException:
        checkpoints.unlock()
        raise
    if ranks.is_main:
        for line in notes_on_data(settings, data):
            print(f"train.py: {line}", file=sys.stderr, flush=True)
    context, published = method.context, method.context.published_mean
    devset = DevSet(
        data.dev, tokenizer, context.sampling, context.limits,
        settings.optimizer.eval_batch_size, settings.run.seed, ranks, published,
        settings.run.rouge_tokenizer,
    )  # fmt: skip
    return Trainer(settings, method, data.train, windows, devset, ranks, checkpoints)


def notes_on_data(settings: SimpleNamespace, data: Data) -> list[str]:
    """What has to be said of the data: rows that are not used as they are, prompts unlike those of the models."""
    notes = [f"{name}: {each.counts}" for name, each in data.sets().items() if str(each.counts)]
    notes += [f"warning: {each.warning}" for each in data.sets().values() if each.warning]
    models = settings.models
    paths = {"--model-path": models.model_path, "--teacher-model-path": models.teacher_model_path}
    unlike = (mismatch(data.train.format, path, option) for option, path in paths.items())
    return [*notes, *(f"warning: {line}" for line in unlike if line)]


def check_exposure_bias(settings: SimpleNamespace, data: Data) -> None:
    """Raise UserError when --exposure-bias-every asks for what this run does not have."""
    if not settings.run.exposure_bias_every:
        return
    if not method_class(settings.method).needs_teacher(settings.method_settings):
        raise UserError(f"--exposure-bias-every compares with a teacher, which --method {settings.method} does not ask")
    if not data.dev:
        raise UserError("--exposure-bias-every needs dev prompts: leave --dev-num 0 out, and have a valid split")


def open_folder(settings: SimpleNamespace, config: dict, folders: dict[str, str], ranks: Ranks):
    """Lock the run's folder and decide where the run starts (`.start`), changing nothing in it.

    Returns the checkpoints, and on the first rank what config.json is to hold.
    """
    run, start, described = settings.run, None, {}
    folder = Path(run.save)
    checkpoints = Checkpoints(folder, ranks, run.keep_checkpoints, run.checkpoint_every, run.checkpoint_minutes)
    if ranks.is_main:
        if run.resume == "must" and not checkpoints.folder.is_dir():
            raise UserError(f"--resume: {checkpoints.folder} is not there: --resume auto starts anew then")
        groups = {k: v for k, v in vars(settings).items() if dataclasses.is_dataclass(v)}
        inputs = {
            "student": settings.models.model_path,
            "teacher": settings.models.teacher_model_path,
            **folders,
        }
        bases = {f"{name}_base": base_of(path, name) for name, path in inputs.items() if path and is_adapter(path)}
        inputs |= {name: path for name, path in bases.items() if os.path.isdir(path)}
        described = describe_run({"method": settings.method, **flat(groups)}, inputs)
        checkpoints.identity = RunFingerprint.of(described["settings"], config, described["inputs"], ranks.dp_size)
        checkpoints.declared = declared_options(map(type, groups.values()))
        checkpoints.lock = lock_folder(folder)
        try:
            start = select_checkpoint(checkpoints, run)
            if start is None:
                check_vacant(folder, run.overwrite, interrupted=run.resume == "auto")
        except UserError:
            checkpoints.unlock()
            raise
    checkpoints.start = ranks.world.all_gather_objects([start])[0]
    return checkpoints, described


def begin_files(checkpoints: Checkpoints, described: dict) -> None:
    """On the first rank, when all is known to work: cut the metrics to the checkpoint, or make room for a new run."""
    folder = checkpoints.run
    if not checkpoints.ranks.is_main:
        return
    write_json(folder / "config.json", described)  # first: where it cannot be written, an earlier run stays whole
    if checkpoints.resumed is None:
        clear_folder(folder)
    else:
        os.truncate(folder / "metrics.jsonl", checkpoints.resumed["metrics_bytes"])


def parameters_of(settings: SimpleNamespace, prompt: Tensor | None) -> dict[str, int | None]:
    """Numbers of parameters, of models and tuned prompt, for config.json: a comparison of costs needs them."""
    paths = {"student": settings.models.model_path, "teacher": settings.models.teacher_model_path}
    counts = {name: count_parameters(place) if place else None for name, place in paths.items()}
    return {**counts, "prompt": None if prompt is None else prompt.numel()}


def read_teacher_config(settings: SimpleNamespace, config: dict, ranks: Ranks) -> dict:
    """What the teacher's engine is started with: a file of its own where the method has one, in --teacher-dtype."""
    path = getattr(settings.method_settings, "teacher_deepspeed_config", None)
    if path is not None:
        config = read_deepspeed_config(path, ranks.device, TEACHER_FILE)
        check_with_deepspeed(config, path, ranks.device, TEACHER_FILE)
    dtype = settings.models.teacher_dtype
    return config if dtype == "auto" else with_precision(config, dtype)


def teacher_stage(kind: type[Method], config: dict) -> int:
    """The ZeRO stage of the teacher's engine; 0 where the method gives it none. config: the teacher's, DeepSpeed's."""
    return zero_stage(config) if kind.teacher_has_engine else 0


def tensor_groups(settings: SimpleNamespace, stage: int, ranks: Ranks) -> tuple[TensorParallelGroup | None, ...]:
    """The ranks that hold the student together with this one, and those that hold the teacher; None: no others."""
    sizes = settings.parallel.size, settings.parallel.teacher_size
    if max(sizes) > 1 and stage > 2:
        raise UserError("--model-parallel does not go with ZeRO-3: set zero_optimization.stage to 0, 1 or 2")
    if settings.parallel.teacher_model_parallel_size and not method_class(settings.method).has_teacher:
        raise UserError(f"--method {settings.method} has no teacher: leave --teacher-model-parallel-size out")
    made = {size: tensor_parallel_group(ranks, size) for size in sorted(set(sizes))}
    return tuple(made[size] for size in sizes)


def load_models(
    settings: SimpleNamespace,
    teacher_config: dict,
    tokenizer,
    groups: tuple[TensorParallelGroup | None, ...],
    ranks: Ranks,
):
    """Student, teacher if the method needs one, and the ids they share (None: all). teacher_config: DeepSpeed's."""
    models, data = settings.models, settings.data
    kind = method_class(settings.method)
    needs_teacher = kind.needs_teacher(settings.method_settings)
    if needs_teacher and not models.teacher_model_path:
        raise UserError(f"--method {settings.method} needs --teacher-model-path: name the teacher's folder")
    if not kind.has_teacher and models.teacher_model_path:
        raise UserError(f"--method {settings.method} has no teacher: leave --teacher-model-path out")
    # Master weights are float32 whatever the engine computes in.
    student = load_causal_lm(models.model_path, torch.float32, "--model-path", models.model_type, groups[0])
    check_positions(student.config, data.max_length, "--model-path")
    if models.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    if not needs_teacher:
        return student, None, None
    dtype = DTYPES[precision(teacher_config)]
    teacher = load_causal_lm(
        models.teacher_model_path, dtype, "--teacher-model-path", group=groups[1],
        packed=loading_options(models.teacher_quantization, dtype, ranks.device),
        lazily=teacher_stage(kind, teacher_config) == 3,
    )  # fmt: skip
    check_positions(teacher.config, data.max_length, "--teacher-model-path")
    if models.gradient_checkpointing:
        teacher.gradient_checkpointing_enable({"use_reentrant": False})
    shared = check_pair(student, teacher, tokenizer, load_tokenizer(models.teacher_model_path))
    return student, teacher, shared


def check_data(settings: SimpleNamespace, shared: SharedVocabulary | None, data: Data, tokenizer) -> None:
    """Raise UserError for data with tokens that the teacher has no embedding for. Reads them only if there can be."""
    if shared is None or vocabulary_size(tokenizer) <= shared.inputs:
        return
    dev = data.dev if settings.run.exposure_bias_every else None
    sets = {"training": data.train, "corpus": data.corpus, "dev": dev}
    for name, examples in sets.items():
        for number in range(len(examples or ())):
            prompt, response = examples[number].prompt, examples[number].response
            shared.check_inputs([(f"example {number + 1} of the {name} data", [*prompt, *response[:-1]])])


def say_shared(context: MethodContext, described: dict) -> None:
    """On the first rank, put what the two vocabularies share on the screen and into config.json's content."""
    if context.ranks.is_main and context.shared is not None:
        print(f"train.py: note: {context.shared.notice(context.limits.end_ids)}", file=sys.stderr, flush=True)
        student, teacher = context.shared.sizes
        described["vocabulary"] = {"student": student, "teacher": teacher, "shared": len(context.shared)}


def build_method(settings, configs, models, tokenizer, data: Data, windows: StepSampler, ranks) -> Method:
    """Start the student's engine and make the method, which starts the teacher's if it trains something there.

    configs: of the student's engine and the teacher's. models: what `load_models` returns.
    """
    student, teacher, shared = models
    how, decoding, sizes = settings.optimizer, settings.decoding, settings.data
    optimization = OptimizerConfig(
        how.lr, total_steps(how, windows), how.lr_decay_style, how.lr_min,
        how.warmup_iters, how.weight_decay, how.clip_grad, how.betas,
    )  # fmt: skip
    token_budget = how.token_budget or TOKEN_BUDGET[ranks.device.type]
    context = MethodContext(
        student=TrainEngine(LanguageModel(student, shared=shared), optimization, configs[0], ranks),
        teacher=teacher,
        tokenizer=tokenizer,
        ranks=ranks,
        limits=LengthLimits(
            sizes.max_length,
            sizes.max_prompt_length,
            token_budget,
            end_ids(tokenizer, student),
            how.rollout_token_budget,
        ),
        sampling=Sampling(decoding.do_sample, decoding.temperature, decoding.top_k, decoding.top_p),
        seed=settings.run.seed,
        optimization=optimization,
        learner=lambda model, optimization: TrainEngine(model, optimization, configs[1], ranks),
        data=data,
        windows=windows,
        shared=shared,
        published_mean=how.loss_normalization == "micro-batch",
    )
    return method_class(settings.method)(context, settings.method_settings)
