"""What is to be planned: models, engines and sizes of a run, from train.py's options and a DeepSpeed file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from promptkd.config.options import TOKEN_BUDGET
from promptkd.errors import UserError
from promptkd.planning.shapes import Shape, read_shape
from promptkd.planning.units import Hardware
from promptkd.utils.project import CONFIGS
from promptkd.utils.strict_json import read_object

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# Bytes of a weight of the layers' products under bitsandbytes: LLM.int8 (its scale for each row is little); NF4 with a
# float32 scale for each 64 weights (bitsandbytes' blocksize).
PACKED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
DEV_ROWS = 1000  # of a dev set that is read in full and not counted here: the paper's
METHODS = ("promptkd", "kd", "seqkd", "sft")
DEEPSPEED_CONFIGS = CONFIGS / "deepspeed"


@dataclass(frozen=True)
class Engine:
    """A model in its DeepSpeed engine. `trained`: parameters that learn, 0 for a teacher without an engine."""

    shape: Shape
    kind: str  # fp32, fp16 or bf16
    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = 500_000_000  # elements: DeepSpeed's reduce_bucket_size
    live: int = 1_000_000_000  # elements: its stage3_max_live_parameters
    tensor: int = 1  # tensor-parallel ranks
    checkpointing: bool = False
    prompt: int = 0  # embeddings of a soft prompt: then these alone are trained
    frozen: bool = False
    packed: str = "none"  # --teacher-quantization

    @property
    def size(self) -> int:
        """Bytes of a number in the precision of the products."""
        return BYTES[self.kind]

    @property
    def parameters(self) -> int:
        return self.shape.parameters(self.tensor)

    @property
    def weights(self) -> float:
        """Bytes of all parameters that a rank holds, before ZeRO shares them out."""
        matrices = self.shape.layers * self.shape.layer_matrices // self.tensor
        packed = PACKED.get(self.packed, self.size)
        return self.size * (self.parameters - matrices) + packed * matrices

    @property
    def trained(self) -> int:
        if self.prompt or self.frozen:
            return self.prompt * self.shape.width
        return self.parameters


@dataclass(frozen=True)
class Setting:
    """A run: sizes are of one data-parallel rank's window, lengths in tokens."""

    method: str
    student: Engine
    teacher: Engine | None
    hardware: Hardware
    rows: int  # examples of a window on one rank
    max_prompt: int
    max_new: int
    token_budget: int
    mean_prompt: float  # for work and time; memory counts on the longest
    mean_response: float
    steps: int
    rollout_token_budget: int | None = None  # None: what memory allows
    dev_rows: int = 0  # answered in an evaluation, on one rank
    exposure_rows: int = 0  # likewise, by student and teacher, where exposure bias is recorded

    @property
    def tensor(self) -> int:
        """Ranks that see the same examples: the larger of both models' groups."""
        return max(self.student.tensor, self.teacher.tensor if self.teacher else 1)

    def data_ranks(self, engine: Engine) -> int:
        """Ranks among which ZeRO shares out what `engine` holds."""
        return self.hardware.ranks // engine.tensor

    @property
    def length(self) -> int:
        return self.max_prompt + self.max_new

    @property
    def device(self) -> str:
        """The device's type, as the core's constants are named by."""
        return "cpu" if self.hardware.cpu else "cuda"

    def micro_rows(self, rows: int | None = None) -> int:
        """Sequences of full length in one forward pass (data/windows.py, group_by_length: one at least).

        rows: how many there are; by default the window's.
        """
        return min(rows or self.rows, max(1, self.token_budget // self.length))

    def micro_batches(self, length: float | None = None) -> int:
        """Forward passes that a window takes, all sequences being `length` long (default: the longest)."""
        fit = max(1, int(self.token_budget // (length or self.length)))
        return -(-self.rows // fit)


def make_setting(
    options: dict[str, Any], hardware: Hardware, examples: int, mean_prompt: float, mean_response: float
) -> Setting:
    """From train.py's resolved options (`--dry-run` prints them). Raises UserError for what cannot be planned."""
    method = options["method"]
    if method not in METHODS:
        raise UserError(f"--method {method} cannot be planned yet: {', '.join(METHODS)} can")
    config, kind = read_engine_config(options["deepspeed_config"], hardware)
    teacher_kind = kind if options["teacher_dtype"] == "auto" else options["teacher_dtype"]
    tensor = options["model_parallel_size"] or 1
    shape = read_shape(options["model_path"], "--model-path")
    recompute = options["gradient_checkpointing"]
    student = _engine(shape, kind, config, tensor, checkpointing=recompute)
    teacher = None
    if options["teacher_model_path"]:
        shape = read_shape(options["teacher_model_path"], "--teacher-model-path")
        size = options["teacher_model_parallel_size"] or tensor
        teacher_config = config
        if path := options.get("teacher_deepspeed_config"):
            teacher_config, own_kind = read_engine_config(path, hardware)
            teacher_kind = own_kind if options["teacher_dtype"] == "auto" else teacher_kind
        packed = options["teacher_quantization"]
        if method == "promptkd":
            how = {"prompt": options["prompt_len"], "checkpointing": recompute, "packed": packed}
            teacher = _engine(shape, teacher_kind, teacher_config, size, **how)
        else:
            teacher = Engine(shape, teacher_kind, 0, tensor=size, frozen=True, packed=packed)
        check_packed(teacher)
    elif method in ("promptkd", "kd"):
        raise UserError(f"--method {method} needs --teacher-model-path: name the teacher's folder")
    for engine in filter(None, (student, teacher)):
        check_tensor(engine, hardware.ranks)
        if engine.stage == 3 and max(e.tensor for e in (student, teacher or student)) > 1:
            raise UserError("--model-parallel does not go with ZeRO-3: set zero_optimization.stage to 0, 1 or 2")
    _check_pair(student, teacher, options["max_length"])
    rows = options["batch_size"] * options["gradient_accumulation_steps"]
    max_new = options["max_length"] - options["max_prompt_length"]
    budget = options["token_budget"] or TOKEN_BUDGET["cpu" if hardware.cpu else "cuda"]
    dev_rows = options["dev_num"] if options["dev_num"] >= 0 else DEV_ROWS
    exposure_rows = min(dev_rows, options["exposure_bias_rows"]) if options["exposure_bias_every"] and teacher else 0
    made = Setting(
        method, student, teacher, hardware, rows, options["max_prompt_length"], max_new, budget,
        min(mean_prompt, options["max_prompt_length"]), min(mean_response, max_new), 0,
        rollout_token_budget=options["rollout_token_budget"],
    )  # fmt: skip
    groups = hardware.ranks // made.tensor
    made = replace(made, dev_rows=-(-dev_rows // groups), exposure_rows=-(-exposure_rows // groups))
    per_epoch = examples // (rows * (hardware.ranks // made.tensor))
    steps = options["total_iters"] or options["epochs"] * per_epoch
    if not steps:
        raise UserError(f"{examples} examples do not fill a step of {rows} x {hardware.ranks // made.tensor}")
    return replace(made, steps=steps)


def read_engine_config(path: str | None, hardware: Hardware) -> tuple[dict[str, Any], str]:
    """The DeepSpeed file's zero_optimization and the precision. UserError when it cannot be read.

    Without a path what promptkd/config/deepspeed.py takes: fp32 without ZeRO on a CPU, bf16 with ZeRO 1 on a GPU.
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


def _engine(shape: Shape, kind: str, zero: dict[str, Any], tensor: int, **how: Any) -> Engine:
    def on_cpu(name: str) -> bool:
        device = (zero.get(name) or {}).get("device", "none")
        if device == "nvme":
            raise UserError(f"{name} on NVMe cannot be planned: say cpu or none")
        return device == "cpu"

    stage = zero.get("stage", 0)
    if stage == 0 and kind != "fp32":
        stage = 1  # deepspeed_file.with_precision does the same for a teacher; a student's file is refused there
    sizes = {}
    for ours, name in (("bucket", "reduce_bucket_size"), ("live", "stage3_max_live_parameters")):
        if isinstance(zero.get(name), (int, float)):
            sizes[ours] = int(zero[name])
    return Engine(
        shape, kind, stage, on_cpu("offload_optimizer") and stage > 0, on_cpu("offload_param") and stage == 3,
        tensor=tensor, **sizes, **how,
    )  # fmt: skip


def tensor_sizes(shape: Shape, ranks: int) -> list[int]:
    """Tensor-parallel sizes that divide heads, feed-forward width and ranks."""
    wholes = shape.heads, shape.key_heads, shape.inner, ranks
    return [size for size in range(1, ranks + 1) if not any(whole % size for whole in wholes)]


def check_tensor(engine: Engine, ranks: int) -> None:
    fits = tensor_sizes(engine.shape, ranks)
    if engine.tensor not in fits:
        raise UserError(
            f"tensor-parallel size {engine.tensor} divides not all of {engine.shape.heads} heads, "
            f"{engine.shape.key_heads} key-value heads, feed-forward width {engine.shape.inner} "
            f"({engine.shape.path}) and {ranks} ranks: use {' or '.join(map(str, fits))}"
        )


def check_packed(teacher: Engine) -> None:
    """As quantization.check_quantization does in a run."""
    given = f"--teacher-quantization {teacher.packed}"
    if teacher.packed != "none" and (teacher.stage == 3 or teacher.tensor > 1):
        raise UserError(f"{given} does not go with a teacher under ZeRO-3 or --model-parallel: leave one of them out")


def _check_pair(student: Engine, teacher: Engine | None, max_length: int) -> None:
    for engine, option in ((student, "--model-path"), (teacher, "--teacher-model-path")):
        if engine is None:
            continue
        need = max_length + engine.prompt
        if need > engine.shape.positions:
            raise UserError(
                f"{option}: {need} positions are needed, the model has {engine.shape.positions}: lower --max-length"
            )
