"""Describe a run for the plan: the shapes of its engines and its sizes, from a RunConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from promptkd.config.deepspeed import precision, zero_stage
from promptkd.config.resolve import RunConfig
from promptkd.errors import UserError
from promptkd.planning.hardware import Hardware
from promptkd.planning.shapes import Shape, read_shape

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# Bytes per weight of the layers' products under bitsandbytes. LLM.int8 has one scale per row, which is negligible. NF4
# has a float32 scale for every 64 weights (bitsandbytes' block size).
PACKED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
DEV_ROWS = 1000  # assumed for a dev set that is read in full: the paper's
PLANNED_METHODS = ("promptkd", "kd", "seqkd", "sft", "gkd", "distillm", "distillm2")
UNPLANNED_METHODS = ("minillm",)


@dataclass(frozen=True)
class Engine:
    """A model and its DeepSpeed engine, or a frozen model without one."""

    shape: Shape
    kind: str  # precision: fp32, fp16 or bf16
    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_bucket: int = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
    live: int = 1_000_000_000  # elements: its stage3_max_live_parameters
    tensor: int = 1  # tensor-parallel ranks
    checkpointing: bool = False
    prompt: int = 0  # length of a soft prompt, which is then all that is trained
    frozen: bool = False
    packed: str = "none"  # --teacher-quantization

    @property
    def size(self) -> int:
        """Bytes of a number in the engine's precision."""
        return BYTES[self.kind]

    @property
    def parameters(self) -> int:
        return self.shape.parameters(self.tensor)

    @property
    def weights(self) -> float:
        """Bytes of the parameters that a rank holds before ZeRO partitions them."""
        matrices = self.shape.layers * self.shape.layer_matrices // self.tensor
        packed = PACKED.get(self.packed, self.size)
        return self.size * (self.parameters - matrices) + packed * matrices

    @property
    def trained(self) -> int:
        """Number of trained parameters on a rank, 0 for a frozen model."""
        if self.prompt or self.frozen:
            return self.prompt * self.shape.width
        return self.parameters

    @property
    def bucket(self) -> int:
        """Elements of the gradient bucket, as `config.deepspeed.with_bucket_for` limits it."""
        return min(self.reduce_bucket, self.trained)


@dataclass(frozen=True)
class Setting:
    """A run. Sizes are per data-parallel rank and step, lengths are in tokens."""

    method: str
    student: Engine
    teacher: Engine | None
    hardware: Hardware
    rows: int  # examples of a step on one rank
    max_prompt: int
    max_new: int
    token_budget: int
    steps: int
    rollout_token_budget: int | None = None  # None: as much as memory allows
    dev_rows: int = 0  # prompts answered in an evaluation, on one rank
    exposure_rows: int = 0  # prompts that student and teacher answer for the exposure bias, on one rank
    answering: tuple[str, ...] = ()  # who may answer the prompts of a step: "student", "teacher"
    keeps_states: bool = False  # whether the student's hidden states are kept from its answers
    sources: int = 1  # sets of `rows` sequences in a step: pairs of responses and a corpus have their own

    @property
    def tensor(self) -> int:
        """Ranks that see the same examples: the larger of the two models' groups."""
        return max(self.student.tensor, self.teacher.tensor if self.teacher else 1)

    def data_ranks(self, engine: Engine) -> int:
        """Count the ranks over which ZeRO partitions an engine's states."""
        return self.hardware.ranks // engine.tensor

    @property
    def length(self) -> int:
        return self.max_prompt + self.max_new

    def micro_rows(self, rows: int | None = None) -> int:
        """Count the sequences of full length in one forward pass, at least one (data/batching.py).

        Args:
            rows: Number of sequences. The default is that of a step.
        """
        return min(rows or self.rows, max(1, self.token_budget // self.length))

    def micro_batches(self) -> int:
        """Count the forward passes of a step's sequences if all have full length."""
        return -(-self.rows * self.sources // self.micro_rows())


def make_setting(config: RunConfig, hardware: Hardware, examples: int) -> Setting:
    """Build the setting of a run.

    Args:
        config: The run.
        hardware: The devices.
        examples: Number of training examples.

    Raises:
        UserError: The run cannot be planned, or its models do not fit its sizes.
    """
    if config.method in UNPLANNED_METHODS:
        raise UserError(f"--method {config.method} cannot be planned: choose one of {', '.join(PLANNED_METHODS)}")
    if config.lora.lora_r:
        raise UserError("--lora-r cannot be planned: leave the options of LoRA out, to plan training of all weights")
    student, teacher = _engines(config, hardware)
    groups = hardware.ranks // config.parallel.copies
    optimizer, run = config.optimizer, config.run
    rows = optimizer.batch_size * optimizer.gradient_accumulation_steps
    steps = optimizer.total_iters or optimizer.epochs * (examples // (rows * groups))
    if not steps:
        raise UserError(f"{examples} examples do not fill a step of {rows} x {groups}: lower --batch-size")
    dev_rows = config.data.dev_num if config.data.dev_num >= 0 else DEV_ROWS
    exposure_rows = min(dev_rows, run.exposure_bias_rows) if run.exposure_bias_every else 0
    return Setting(
        method=config.method,
        student=student,
        teacher=teacher,
        hardware=hardware,
        rows=rows,
        max_prompt=config.data.max_prompt_length,
        max_new=config.data.max_length - config.data.max_prompt_length,
        token_budget=config.token_budget,
        steps=steps,
        rollout_token_budget=optimizer.rollout_token_budget,
        dev_rows=-(-dev_rows // groups),
        exposure_rows=-(-exposure_rows // groups),
        **_responses(config),
    )


def _responses(config: RunConfig) -> dict[str, Any]:
    """Describe where the responses of a step come from: fields of `Setting`."""
    options = config.method_settings
    # A method of another package may let the student answer every prompt.
    fraction = getattr(options, "student_data_fraction", 0.0 if config.method in PLANNED_METHODS else 1.0)
    answers = fraction > 0 or config.method == "distillm"
    pairs = config.method == "distillm2" or getattr(options, "lm_data_dir", None) is not None
    return {
        "answering": ("student",) * answers + ("teacher",) * getattr(options, "seq_kd", False),
        "keeps_states": config.trains_teacher and fraction == 1,
        "sources": 2 if pairs else 1,
    }


def _engines(config: RunConfig, hardware: Hardware) -> tuple[Engine, Engine | None]:
    """Describe the engines of student and teacher, and check that the models fit them."""
    models, sizes, recompute = config.models, config.parallel, config.models.gradient_checkpointing
    shape = read_shape(models.model_path, "--model-path")
    student = _engine(shape, config.deepspeed, sizes.size, checkpointing=recompute)
    teacher = None
    if models.teacher_model_path:
        shape, packed = read_shape(models.teacher_model_path, "--teacher-model-path"), models.teacher_quantization
        if config.trains_teacher:
            prompt = getattr(config.method_settings, "prompt_len", 0)
            teacher = _engine(
                shape, config.teacher_deepspeed, sizes.teacher_size, prompt=prompt, checkpointing=recompute,
                packed=packed,
            )  # fmt: skip
        else:
            kind = precision(config.teacher_deepspeed)
            teacher = Engine(shape, kind, 0, tensor=sizes.teacher_size, frozen=True, packed=packed)
    for option, engine in {"--model-path": student, "--teacher-model-path": teacher}.items():
        if engine is None:
            continue
        check_tensor(engine, hardware.ranks)
        if (need := config.data.max_length + engine.prompt) > engine.shape.positions:
            raise UserError(
                f"{option}: {need} positions are needed, the model has {engine.shape.positions}: lower --max-length"
            )
    return student, teacher


def _engine(shape: Shape, config: dict[str, Any], tensor: int, **fields: Any) -> Engine:
    """Describe an engine with a DeepSpeed configuration."""
    zero = config.get("zero_optimization", {})

    def on_cpu(name: str) -> bool:
        device = (zero.get(name) or {}).get("device", "none")
        if device == "nvme":
            raise UserError(f"{name} on NVMe cannot be planned: use cpu or none")
        return device == "cpu"

    stage = zero_stage(config)
    for field, name in (("reduce_bucket", "reduce_bucket_size"), ("live", "stage3_max_live_parameters")):
        if isinstance(zero.get(name), (int, float)):
            fields[field] = int(zero[name])
    return Engine(
        shape, precision(config), stage,
        offload_optimizer=on_cpu("offload_optimizer") and stage > 0,
        offload_parameters=on_cpu("offload_param") and stage == 3,
        tensor=tensor, **fields,
    )  # fmt: skip


def tensor_sizes(shape: Shape, ranks: int) -> list[int]:
    """List the tensor-parallel sizes that divide heads, feed-forward width and ranks."""
    counts = shape.heads, shape.key_heads, shape.inner, ranks
    return [size for size in range(1, ranks + 1) if not any(count % size for count in counts)]


def check_tensor(engine: Engine, ranks: int) -> None:
    """Raise UserError unless the engine's tensor-parallel size divides the model and the ranks."""
    fits = tensor_sizes(engine.shape, ranks)
    if engine.tensor not in fits:
        raise UserError(
            f"tensor-parallel size {engine.tensor} does not divide all of {engine.shape.heads} heads, "
            f"{engine.shape.key_heads} key-value heads, feed-forward width {engine.shape.inner} "
            f"({engine.shape.path}) and {ranks} ranks: use {' or '.join(map(str, fits))}"
        )
