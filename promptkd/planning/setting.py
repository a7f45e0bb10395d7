"""Describe a run for the plan: its engines and sizes, from train.py's options and a DeepSpeed file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptkd.config.options import TOKEN_BUDGET
from promptkd.errors import UserError
from promptkd.planning.hardware import Hardware
from promptkd.planning.shapes import Shape, read_shape
from promptkd.utils.project import CONFIGS
from promptkd.utils.strict_json import read_object

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# Bytes per weight of the layers' products under bitsandbytes. LLM.int8 has one scale per row, which is negligible. NF4
# has a float32 scale for every 64 weights (bitsandbytes' block size).
PACKED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
DEV_ROWS = 1000  # assumed for a dev set that is read in full: the paper's
METHODS = ("promptkd", "kd", "seqkd", "sft")
DEEPSPEED_CONFIGS = CONFIGS / "deepspeed"


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
        """Count the forward passes of a step's examples if all have full length."""
        return -(-self.rows // self.micro_rows())


def make_setting(options: dict[str, Any], hardware: Hardware, examples: int) -> Setting:
    """Build the setting of a run.

    Args:
        options: train.py's resolved options, as `--dry-run` prints them.
        hardware: The devices.
        examples: Number of training examples.

    Raises:
        UserError: If the run cannot be planned, or its options exclude each other.
    """
    method = options["method"]
    if method not in METHODS:
        raise UserError(f"--method {method} cannot be planned yet: {', '.join(METHODS)} can")
    student, teacher = _engines(options, hardware)
    tensor = max(engine.tensor for engine in (student, teacher) if engine)
    groups = hardware.ranks // tensor
    rows = options["batch_size"] * options["gradient_accumulation_steps"]
    steps = options["total_iters"] or options["epochs"] * (examples // (rows * groups))
    if not steps:
        raise UserError(f"{examples} examples do not fill a step of {rows} x {groups}: lower --batch-size")
    dev_rows = options["dev_num"] if options["dev_num"] >= 0 else DEV_ROWS
    exposure_rows = min(dev_rows, options["exposure_bias_rows"]) if options["exposure_bias_every"] and teacher else 0
    return Setting(
        method=method,
        student=student,
        teacher=teacher,
        hardware=hardware,
        rows=rows,
        max_prompt=options["max_prompt_length"],
        max_new=options["max_length"] - options["max_prompt_length"],
        token_budget=options["token_budget"] or TOKEN_BUDGET[hardware.device],
        steps=steps,
        rollout_token_budget=options["rollout_token_budget"],
        dev_rows=-(-dev_rows // groups),
        exposure_rows=-(-exposure_rows // groups),
    )


def _engines(options: dict[str, Any], hardware: Hardware) -> tuple[Engine, Engine | None]:
    """Describe the engines of student and teacher, and check that their options go together."""
    zero, kind = read_engine_config(options["deepspeed_config"], hardware)
    tensor, recompute = options["model_parallel_size"] or 1, options["gradient_checkpointing"]
    student = _engine(read_shape(options["model_path"], "--model-path"), kind, zero, tensor, checkpointing=recompute)
    teacher = None
    if options["teacher_model_path"]:
        shape = read_shape(options["teacher_model_path"], "--teacher-model-path")
        if path := options.get("teacher_deepspeed_config"):
            zero, kind = read_engine_config(path, hardware)
        kind = kind if options["teacher_dtype"] == "auto" else options["teacher_dtype"]
        size, packed = options["teacher_model_parallel_size"] or tensor, options["teacher_quantization"]
        if options["method"] == "promptkd":
            prompt = options["prompt_len"]
            teacher = _engine(shape, kind, zero, size, prompt=prompt, checkpointing=recompute, packed=packed)
        else:
            teacher = Engine(shape, kind, 0, tensor=size, frozen=True, packed=packed)
        check_packed(teacher)
    elif options["method"] in ("promptkd", "kd"):
        raise UserError(f"--method {options['method']} needs --teacher-model-path: name the teacher's folder")
    engines = {"--model-path": student, "--teacher-model-path": teacher}
    for option, engine in engines.items():
        if engine is None:
            continue
        check_tensor(engine, hardware.ranks)
        if engine.stage == 3 and max(e.tensor for e in engines.values() if e) > 1:
            raise UserError("--model-parallel does not go with ZeRO-3: set zero_optimization.stage to 0, 1 or 2")
        if (need := options["max_length"] + engine.prompt) > engine.shape.positions:
            raise UserError(
                f"{option}: {need} positions are needed, the model has {engine.shape.positions}: lower --max-length"
            )
    return student, teacher


def read_engine_config(path: str | None, hardware: Hardware) -> tuple[dict[str, Any], str]:
    """Read zero_optimization and the precision from a DeepSpeed file.

    The default is that of `config.deepspeed`: fp32 without ZeRO on a CPU, bf16 with ZeRO-1 on a GPU.

    Raises:
        UserError: If the file cannot be read or used.
    """
    file = Path(path or DEEPSPEED_CONFIGS / ("ds_config_fp32.json" if hardware.cpu else "ds_config_bf16.json"))
    config = read_object(file, f"name one of {DEEPSPEED_CONFIGS}/*.json as --deepspeed_config")
    try:
        zero = config.get("zero_optimization", {})
        enabled = [kind for kind in ("fp16", "bf16") if config.get(kind, {}).get("enabled")]
        kind = (enabled or ["fp32"])[0]
        if zero.get("stage", 0) not in (0, 1, 2, 3):
            raise ValueError(f"zero_optimization.stage is {zero['stage']!r}")
    except (ValueError, AttributeError) as error:
        raise UserError(f"--deepspeed_config {file}: {error}: name one of {DEEPSPEED_CONFIGS}/*.json") from None
    if hardware.cpu and kind == "fp16":
        raise UserError(f"--deepspeed_config {file} asks for fp16, which a CPU does not have: use ds_config_fp32.json")
    return zero, kind


def _engine(shape: Shape, kind: str, zero: dict[str, Any], tensor: int, **fields: Any) -> Engine:
    def on_cpu(name: str) -> bool:
        device = (zero.get(name) or {}).get("device", "none")
        if device == "nvme":
            raise UserError(f"{name} on NVMe cannot be planned: use cpu or none")
        return device == "cpu"

    stage = zero.get("stage", 0)
    if stage == 0 and kind != "fp32":
        stage = 1  # config.deepspeed.with_precision does the same for a teacher and refuses a student's file
    for field, name in (("reduce_bucket", "reduce_bucket_size"), ("live", "stage3_max_live_parameters")):
        if isinstance(zero.get(name), (int, float)):
            fields[field] = int(zero[name])
    return Engine(
        shape, kind, stage, on_cpu("offload_optimizer") and stage > 0, on_cpu("offload_param") and stage == 3,
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


def check_packed(teacher: Engine) -> None:
    """Raise UserError if the teacher's quantization does not go with its engine, as `models.quantization` does."""
    given = f"--teacher-quantization {teacher.packed}"
    if teacher.packed != "none" and (teacher.stage == 3 or teacher.tensor > 1):
        raise UserError(f"{given} does not go with a teacher under ZeRO-3 or --model-parallel: leave one of them out")
