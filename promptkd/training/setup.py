"""Build a trainer from a RunConfig. Everything is read and checked before anything is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from promptkd.checkpointing.fingerprint import RunFingerprint
from promptkd.checkpointing.manager import Checkpoints, recorded_time, select_checkpoint
from promptkd.config.deepspeed import check_with_deepspeed
from promptkd.config.parser import declared_options
from promptkd.config.reporting_options import hub_token
from promptkd.config.resolve import TEACHER_FILE, RunConfig
from promptkd.data.prompt_format import mismatch
from promptkd.data.templates import bind_settings, now
from promptkd.distributed.ranks import Ranks, setup
from promptkd.engine.engine import TrainEngine
from promptkd.engine.optim import OptimizerConfig
from promptkd.errors import UserError
from promptkd.generation.sampling import Sampling
from promptkd.methods.base import Method, step_sampler
from promptkd.methods.context import DatasetBundle, LengthLimits, MethodContext
from promptkd.models.loading import (
    count_parameters,
    end_ids,
    load_config,
    load_own_tokenizer,
)
from promptkd.models.quantization import check_installed
from promptkd.models.wrapper import LanguageModel
from promptkd.training.model_pair import Models, check_token_ids, input_folders, load_models
from promptkd.training.run_folder import check_inputs, check_vacant, clear_folder, describe_run
from promptkd.training.trackers import Trackers, check_packages
from promptkd.training.trainer import Trainer, total_steps
from promptkd.training.validation import DevSet
from promptkd.utils.files import lock_folder, write_json


def build_trainer(config: RunConfig) -> Trainer:
    """Join the ranks, read data and models, check that they fit together, claim the folder, and start the engines.

    Raises:
        UserError: Something is missing, does not fit, or already exists. Nothing has been written then.
    """
    ranks = setup(config.parallel.copies, config.device)
    check_with_deepspeed(config.deepspeed, config.optimizer.deepspeed_config, ranks.device)
    if (path := config.models.teacher_deepspeed_config) is not None:
        check_with_deepspeed(config.teacher_deepspeed, path, ranks.device, TEACHER_FILE)
    check_installed(config.models.teacher_quantization, "--teacher-quantization")
    check_installed(config.lora.student_quantization, "--student-quantization")
    check_packages(config.reporting.report_to)
    if (repo := config.reporting.push_to_hub) is not None:
        hub_token(repo, "--push-to-hub")
    tokenizer = load_bound_tokenizer(config, ranks)
    kind = cast("type[Method]", config.method_class)
    data = kind.open_data(config, tokenizer)
    check_dev_set(config, data)
    sampler = kind.make_sampler(config, data, ranks)
    models = load_models(config, tokenizer, ranks, data)
    check_token_ids(config, models.shared, data, tokenizer)
    checkpoints, record = open_folder(config, data.folders, ranks)
    try:
        method = build_method(config, models, tokenizer, data, sampler, ranks)
        report_shared_vocabulary(method.context, record)
        if checkpoints.start is not None:
            checkpoints.load(method)
        record |= {
            "parameters": count_all_parameters(config, method.prompt()),
            "rows": {name: examples.record() for name, examples in data.sets().items()},
        }
        trackers = Trackers(checkpoints.resumed)
        ranks.on_first(lambda: trackers.start(config.reporting.report_to, checkpoints.run, config.as_dict()))
        begin_files(checkpoints, record)
    except BaseException:
        checkpoints.unlock()
        raise
    if ranks.is_main:
        for line in notes_on_data(config, data):
            print(f"train.py: {line}", file=sys.stderr, flush=True)
    context = method.context
    dev = DevSet(
        data.dev, tokenizer, context.sampling, context.limits,
        config.optimizer.eval_batch_size, config.run.seed, ranks, context.published_mean, config.run.rouge_tokenizer,
    )  # fmt: skip
    return Trainer(config, method, data.train, sampler, dev, ranks, checkpoints, trackers)


def load_bound_tokenizer(config: RunConfig, ranks: Ranks) -> Any:
    """Load the student's tokenizer and bind the chat template's arguments and time to it.

    A resumed run keeps the time of its start, which a template with a date writes into prompts.
    """
    path = config.models.model_path
    tokenizer = load_own_tokenizer(path, load_config(path, "--model-path"), "--model-path")
    recorded = recorded_time(Path(config.run.save)) if config.run.resume != "never" else None
    bind_settings(tokenizer, config.data, ranks.world.all_gather_objects([recorded or now()])[0])
    return tokenizer


def check_dev_set(config: RunConfig, data: DatasetBundle) -> None:
    """Raise UserError if the dev set lacks what the evaluations need."""
    if config.run.eval_gen and data.dev is not None and data.dev.references is None:
        raise UserError("the dev set has no reference texts (valid.jsonl): add it or pass --no-eval-gen")
    if config.run.exposure_bias_every and not data.dev:
        raise UserError("--exposure-bias-every needs dev prompts: add a valid split")


def notes_on_data(config: RunConfig, data: DatasetBundle) -> list[str]:
    """Return lines about rows that are skipped or cut, and about prompts unlike those of the models' training."""
    notes = [f"{name}: {examples.counts}" for name, examples in data.sets().items() if str(examples.counts)]
    notes += [f"warning: {examples.warning}" for examples in data.sets().values() if examples.warning]
    models = config.models
    paths = {"--model-path": models.model_path, "--teacher-model-path": models.teacher_model_path}
    unlike = (mismatch(data.train.format, path, option) for option, path in paths.items())
    return [*notes, *(f"warning: {line}" for line in unlike if line)]


def build_method(
    config: RunConfig, models: Models, tokenizer: Any, data: DatasetBundle, sampler: Any, ranks: Ranks
) -> Method:
    """Start the student's engine and create the method, which starts the teacher's engine if it trains a prompt."""
    options, decoding = config.optimizer, config.decoding
    optimization = OptimizerConfig(
        options.lr, total_steps(options, sampler), options.lr_decay_style, options.lr_min,
        options.warmup_iters, options.weight_decay, options.clip_grad, options.betas,
    )  # fmt: skip
    context = MethodContext(
        student=TrainEngine(LanguageModel(models.student, shared=models.shared), optimization, config.deepspeed, ranks),
        teacher=models.teacher,
        tokenizer=tokenizer,
        ranks=ranks,
        limits=LengthLimits(
            config.data.max_length,
            config.data.max_prompt_length,
            config.token_budget,
            end_ids(tokenizer, models.student),
            options.rollout_token_budget,
        ),
        sampling=Sampling(decoding.do_sample, decoding.temperature, decoding.top_k, decoding.top_p),
        seed=config.run.seed,
        optimization=optimization,
        make_engine=lambda model, optimization: TrainEngine(model, optimization, config.teacher_deepspeed, ranks),
        data=data,
        sampler=sampler,
        corpus_sampler=None if data.corpus is None else step_sampler(config, len(data.corpus), ranks),
        teacher_cache=models.teacher_cache,
        shared=models.shared,
        published_mean=options.loss_normalization == "micro-batch",
    )
    return cast("type[Method]", config.method_class)(context, config.method_settings)


def report_shared_vocabulary(context: MethodContext, record: dict[str, Any]) -> None:
    """On the first rank, print which token ids the two models share, and add it to the content of config.json."""
    if context.ranks.is_main and context.shared is not None:
        print(f"train.py: note: {context.shared.notice(context.limits.end_ids)}", file=sys.stderr, flush=True)
        student, teacher = context.shared.sizes
        record["vocabulary"] = {"student": student, "teacher": teacher, "shared": len(context.shared)}


def open_folder(config: RunConfig, folders: dict[str, str], ranks: Ranks) -> tuple[Checkpoints, dict[str, Any]]:
    """Lock the run's folder and select the checkpoint to start from, without changing the folder.

    Args:
        config: The run.
        folders: Folders of the data by name.
        ranks: This process's position.

    Returns:
        The checkpoints, whose `start` is the selected one, and on the first rank the content of config.json.
    """
    run = config.run
    start: str | None = None
    record: dict[str, Any] = {}
    folder = Path(run.save)
    checkpoints = Checkpoints(folder, ranks, run.keep_checkpoints, run.checkpoint_every, run.checkpoint_minutes)
    if ranks.is_main:
        if run.resume == "must" and not checkpoints.folder.is_dir():
            raise UserError(f"--resume: {checkpoints.folder} does not exist: --resume auto starts a new run then")
        inputs = input_folders(config, folders)
        record = describe_run(config.as_dict(), inputs)
        checkpoints.identity = RunFingerprint.of(record["settings"], config.engines, record["inputs"], ranks.dp_size)
        checkpoints.declared = declared_options(map(type, config.groups().values()))
        checkpoints.lock = lock_folder(folder)
        try:
            start = select_checkpoint(checkpoints, run)
            if start is None:
                check_vacant(folder, run.overwrite, interrupted=run.resume == "auto")
                check_inputs(folder, inputs.values())
        except UserError:
            checkpoints.unlock()
            raise
    checkpoints.start = ranks.world.all_gather_objects([start])[0]
    return checkpoints, record


def begin_files(checkpoints: Checkpoints, record: dict[str, Any]) -> None:
    """On the first rank, truncate the metrics to the checkpoint, or clear the folder for a new run."""
    folder = checkpoints.run
    if not checkpoints.ranks.is_main:
        return
    write_json(folder / "config.json", record)  # First: if it cannot be written, an earlier run stays complete.
    if checkpoints.resumed is None:
        clear_folder(folder)
    else:
        os.truncate(folder / "metrics.jsonl", checkpoints.resumed["metrics_bytes"])


def count_all_parameters(config: RunConfig, prompt: Tensor | None) -> dict[str, int | None]:
    """Return the numbers of parameters of models and soft prompt, for config.json."""
    paths = {"student": config.models.model_path, "teacher": config.models.teacher_model_path}
    counts = {name: count_parameters(path) if path else None for name, path in paths.items()}
    return {**counts, "prompt": None if prompt is None else prompt.numel()}
