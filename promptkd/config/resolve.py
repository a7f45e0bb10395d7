"""From a command line to one frozen configuration of a run. All rules between options are here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from promptkd.config.deepspeed import precision, read_deepspeed_config, with_precision, zero_stage
from promptkd.config.lora_options import LoraSettings
from promptkd.config.option_file import config_arguments, split_config
from promptkd.config.options import (
    TOKEN_BUDGET,
    DataSettings,
    DecodingSettings,
    DeviceSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    TrainingParallelSettings,
)
from promptkd.config.parser import flat, parse
from promptkd.config.reporting_options import ReportingSettings
from promptkd.errors import UserError

TEACHER_FILE = "--teacher-deepspeed-config"
FindMethod = Callable[[str], Any]  # a `MethodClass` by its name


class MethodClass(Protocol):
    """What the rules need to know of a method (`promptkd.methods.base.Method`)."""

    Settings: ClassVar[type]
    OptimizerSettings: ClassVar[type]
    has_teacher: ClassVar[bool]

    def needs_teacher(self, settings: Any) -> bool: ...

    def trains_teacher(self, settings: Any) -> bool: ...

    def check(self, options: RunOptions) -> None: ...


@dataclass(frozen=True)
class RunOptions:
    """The options of a training run, in groups, checked against each other.

    Attributes:
        method: The method's name.
        method_class: The class that the name stands for.
        method_settings: The method's own options.
    """

    method: str
    method_class: MethodClass
    method_settings: Any
    run: RunSettings
    device: DeviceSettings
    models: ModelSettings
    lora: LoraSettings
    parallel: TrainingParallelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    decoding: DecodingSettings
    reporting: ReportingSettings

    @property
    def needs_teacher(self) -> bool:
        """Whether the method uses a teacher with these options, or exposure bias is measured against one."""
        return self.method_class.needs_teacher(self.method_settings) or self.run.exposure_bias_every > 0

    @property
    def trains_teacher(self) -> bool:
        """Whether the method trains something in its teacher."""
        return self.method_class.trains_teacher(self.method_settings)

    def groups(self) -> dict[str, Any]:
        """Return the option groups by name."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {
            name: group for name, group in fields if dataclasses.is_dataclass(group) and not isinstance(group, type)
        }

    def as_dict(self) -> dict[str, Any]:
        """Return all options by name, `method` first, as config.json and checkpoints hold them."""
        return {"method": self.method, **flat(self.groups())}


@dataclass(frozen=True)
class RunConfig(RunOptions):
    """A run's options together with what they mean on its device.

    Attributes:
        device_type: "cpu" or "cuda".
        deepspeed: Configuration of the student's engine.
        teacher_deepspeed: Configuration of the teacher's engine, in the teacher's precision.
    """

    device_type: str
    deepspeed: dict[str, Any]
    teacher_deepspeed: dict[str, Any]

    @property
    def teacher_stage(self) -> int:
        """The ZeRO stage of the teacher's engine, 0 if the method gives it none."""
        return zero_stage(self.teacher_deepspeed) if self.trains_teacher else 0

    @property
    def token_budget(self) -> int:
        """Padded tokens in one forward pass, at most."""
        return self.optimizer.token_budget or TOKEN_BUDGET[self.device_type]

    @property
    def engines(self) -> dict[str, Any]:
        """What a checkpoint records of the DeepSpeed files."""
        own_file = self.models.teacher_deepspeed_config is not None
        return {**self.deepspeed, "teacher": self.teacher_deepspeed} if own_file else self.deepspeed


def read_options(argv: list[str], find_method: FindMethod, prog: str = "train.py") -> RunOptions:
    """Read the command line of a training run and check the rules that need no file.

    Args:
        argv: The arguments, `--config FILE` included.
        find_method: Returns a method's class by name (`promptkd.methods.registry.method_class`).
        prog: The program's name, for help texts.

    Raises:
        UserError: An option is unknown, has an unusable value, or does not go with another one.
    """
    method = _method_name(argv)
    kind = find_method(method)
    groups = {
        "run": RunSettings,
        "device": DeviceSettings,
        "models": ModelSettings,
        "lora": LoraSettings,
        "parallel": TrainingParallelSettings,
        "data": DataSettings,
        "optimizer": kind.OptimizerSettings,
        "decoding": DecodingSettings,
        "reporting": ReportingSettings,
        "method_settings": kind.Settings,
    }

    def checked(values: Any) -> RunOptions:
        options = RunOptions(method_class=kind, **vars(values))
        check_options(options)
        return options

    options: RunOptions = parse(groups, argv, prog, choice={"method": method}, check=checked)
    return options


def resolve(
    argv: list[str], find_method: FindMethod, device_type: Callable[[], str], prog: str = "train.py"
) -> RunConfig:
    """Read the command line of a training run, and the DeepSpeed files that it names, and check all rules.

    Nothing else is read, and nothing is written. No rank waits for another one before this has passed on all of them.

    Args:
        argv: The arguments, `--config FILE` included.
        find_method: Returns a method's class by name.
        device_type: Returns "cpu" or "cuda". It is not called for --help and --dry-run.
        prog: The program's name, for help texts.

    Raises:
        UserError: As `read_options`, or a DeepSpeed file cannot be used.
    """
    options = read_options(argv, find_method, prog)
    device = device_type()
    student = read_deepspeed_config(options.optimizer.deepspeed_config, torch.device(device))
    teacher, path = student, options.models.teacher_deepspeed_config
    if path is not None:
        teacher = read_deepspeed_config(path, torch.device(device), TEACHER_FILE)
    dtype = options.models.teacher_dtype
    teacher = with_precision(teacher, precision(teacher) if dtype == "auto" else dtype)
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    config = RunConfig(**fields, device_type=device, deepspeed=student, teacher_deepspeed=teacher)
    check_engines(config)
    return config


def check_options(options: RunOptions) -> None:
    """Raise UserError for options that do not go together."""
    method, models, run = options.method, options.models, options.run
    if not options.method_class.has_teacher and not run.exposure_bias_every:
        for option, value in (
            ("--teacher-model-path", models.teacher_model_path),
            ("--teacher-model-parallel-size", options.parallel.teacher_model_parallel_size),
        ):
            if value:
                raise UserError(f"--method {method} has no teacher: leave {option} out")
    if models.teacher_deepspeed_config is not None and not options.trains_teacher:
        raise UserError(f"--method {method} trains nothing in its teacher: leave {TEACHER_FILE} out")
    if options.needs_teacher and not models.teacher_model_path:
        user = "--exposure-bias-every" if run.exposure_bias_every else f"--method {method}"
        raise UserError(f"{user} needs --teacher-model-path: name the teacher's folder")
    if run.exposure_bias_every and options.data.dev_num == 0:
        raise UserError("--exposure-bias-every needs dev prompts: leave --dev-num 0 out")
    if (bits := models.teacher_quantization) != "none":
        if not models.teacher_model_path:
            raise UserError(f"--teacher-quantization {bits} needs --teacher-model-path: name the teacher's folder")
        if options.parallel.teacher_size > 1:
            raise UserError(
                f"--teacher-quantization {bits} does not go with a teacher cut by --model-parallel-size: "
                "leave one of them out"
            )
    if options.lora.lora_r and options.parallel.size > 1:
        raise UserError("--lora-r does not go with a student cut by --model-parallel-size: leave one of them out")
    options.method_class.check(options)


def check_engines(config: RunConfig) -> None:
    """Raise UserError for options that do not go with the DeepSpeed files."""
    stages = zero_stage(config.deepspeed), zero_stage(config.teacher_deepspeed)
    if config.parallel.copies > 1 and max(stages) > 2:
        raise UserError("--model-parallel does not go with ZeRO-3: set zero_optimization.stage to 0, 1 or 2")
    if config.models.teacher_quantization != "none" and config.teacher_stage == 3:
        raise UserError(
            f"--teacher-quantization {config.models.teacher_quantization} does not go with ZeRO-3, which cannot "
            f"partition such weights: name a {TEACHER_FILE} of stage 0, 1 or 2"
        )
    if (bits := config.lora.student_quantization) != "none" and stages[0] == 3:
        raise UserError(
            f"--student-quantization {bits} does not go with ZeRO-3, which cannot partition such weights: set "
            "zero_optimization.stage to 0, 1 or 2"
        )


def _method_name(argv: list[str]) -> str:
    """Find `--method` in the arguments or in the file of `--config`. The method decides which options there are."""
    path, words = split_config(argv)
    words = [*(config_arguments(path) if path is not None else []), *words]
    named = [
        word.partition("=")[2] if "=" in word else after
        for word, after in zip(words, [*words[1:], ""])
        if word == "--method" or word.startswith("--method=")
    ]
    return named[-1] if named else "is missing"
