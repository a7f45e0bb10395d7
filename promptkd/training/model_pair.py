"""Load the models of a run, and check that they fit each other and the data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from promptkd.config.deepspeed import DTYPES, precision
from promptkd.config.resolve import RunConfig
from promptkd.data.dataset import vocabulary_size
from promptkd.distributed.ranks import Ranks
from promptkd.engine.teacher_cache import TeacherCache
from promptkd.methods.context import DatasetBundle
from promptkd.models.adapters import base_of, is_adapter
from promptkd.models.loading import (
    check_pair,
    check_positions,
    load_causal_lm,
    load_tokenizer,
    load_without_layers,
)
from promptkd.models.quantization import loading_options
from promptkd.models.student import load_student
from promptkd.models.tensor_parallel import TensorParallelGroup, tensor_parallel_group
from promptkd.models.vocabulary import SharedVocabulary
from promptkd.utils.files import fingerprint


@dataclass(frozen=True)
class Models:
    """The models of a run.

    Attributes:
        student: The student.
        teacher: The teacher in its own precision. None if the method uses none.
        shared: The token ids that both models know. None if these are all.
        teacher_cache: The teacher's states on the training examples, if the run uses a cache of them.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None = None
    shared: SharedVocabulary | None = None
    teacher_cache: TeacherCache | None = None


def open_teacher_cache(config: RunConfig, data: DatasetBundle) -> TeacherCache | None:
    """Open the cache of the teacher's states that a method's options name, if there is one."""
    folder, models = getattr(config.method_settings, "teacher_cache", None), config.models
    if folder is None:
        return None
    inputs = {name: path for name, path in input_folders(config, {}).items() if name.startswith("teacher") and path}
    teacher = {name: fingerprint(path) if os.path.isdir(path) else path for name, path in inputs.items()}
    dtype = precision(config.teacher_deepspeed)
    identity = {**teacher, "dtype": dtype, "quantization": models.teacher_quantization}
    return TeacherCache.open(folder, identity, data.train, DTYPES[dtype], config.token_budget)


def load_models(config: RunConfig, tokenizer: Any, ranks: Ranks, data: DatasetBundle) -> Models:
    """Load the student, and the teacher if the method uses one.

    Raises:
        UserError: A model cannot be loaded or is too short for --max-length, or the two do not fit together.
    """
    models, length = config.models, config.data.max_length
    groups = tensor_parallel_pair(config, ranks)
    student = load_student(config, ranks.device, groups[0])
    check_positions(student.config, length, "--model-path")
    if not config.needs_teacher:
        return Models(student)
    assert models.teacher_model_path is not None
    dtype = DTYPES[precision(config.teacher_deepspeed)]
    cache = open_teacher_cache(config, data)
    if cache is not None and cache.width:
        teacher = load_without_layers(models.teacher_model_path, dtype, "--teacher-model-path")
    else:
        teacher = load_causal_lm(
            models.teacher_model_path, dtype, "--teacher-model-path", group=groups[1],
            quantization=loading_options(models.teacher_quantization, dtype, ranks.device),
            deferred=config.teacher_stage == 3,
        )  # fmt: skip
    check_positions(teacher.config, length, "--teacher-model-path")
    if models.gradient_checkpointing:
        teacher.gradient_checkpointing_enable({"use_reentrant": False})
    shared = check_pair(student, teacher, tokenizer, load_tokenizer(models.teacher_model_path))
    return Models(student, teacher, shared, cache)


def tensor_parallel_pair(config: RunConfig, ranks: Ranks) -> list[TensorParallelGroup | None]:
    """Return the tensor-parallel groups of student and teacher. Groups of the same size are one object."""
    sizes = config.parallel.size, config.parallel.teacher_size
    groups = {size: tensor_parallel_group(ranks, size) for size in sorted(set(sizes))}
    return [groups[size] for size in sizes]


def check_token_ids(config: RunConfig, shared: SharedVocabulary | None, data: DatasetBundle, tokenizer: Any) -> None:
    """Raise UserError if the data have token ids that the teacher has no embedding for."""
    if shared is None or vocabulary_size(tokenizer) <= shared.inputs:
        return  # No such id can occur, and the data need not be read.
    dev = data.dev if config.run.exposure_bias_every else None
    sets = {"training": data.train, "corpus": data.corpus, "dev": dev}
    for name, examples in sets.items():
        if examples is None:
            continue
        for number in range(len(examples)):
            prompt, response = examples[number].prompt, examples[number].response
            shared.check_inputs([(f"example {number + 1} of the {name} data", [*prompt, *response[:-1]])])


def input_folders(config: RunConfig, folders: dict[str, str]) -> dict[str, str | None]:
    """Return all folders that decide the results, by name: models, the base models of adapters, and data."""
    inputs: dict[str, str | None] = {
        "student": config.models.model_path,
        "teacher": config.models.teacher_model_path,
        "prompt_init": getattr(config.method_settings, "prompt_init", None),
        **folders,
    }
    models = {name: path for name, path in inputs.items() if path and name in ("student", "teacher")}
    bases = {f"{name}_base": base_of(path, name) for name, path in models.items() if is_adapter(path)}
    return inputs | {name: path for name, path in bases.items() if os.path.isdir(path)}
