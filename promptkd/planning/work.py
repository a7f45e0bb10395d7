"""Work of a step: floating-point operations, bytes of memory and of the network, and the seconds they suggest.

An estimate of order: rates are shares of the makers' peaks (units.py), lengths are means. Operations are counted as
two for each weight and token, twice that again for a backward pass (Kaplan et al., 2020, section 2.1), attention apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from promptkd.planning.decoding import decoding_rows
from promptkd.planning.setting import Engine, Setting
from promptkd.planning.shapes import Shape
from promptkd.planning.units import BANDWIDTH_SHARE, COMPUTE_SHARE, Hardware

# A layer's kernels cannot be launched faster from Python, whatever their size: an assumption for transformers on a GPU.
LAYER_SECONDS = 0.3e-3
# AdamW of an offloaded optimizer runs on the machine's cores: bytes a second of all its memory channels, an assumption.
HOST_BANDWIDTH = 100e9


@dataclass
class Phase:
    """Of one rank and step: operations, bytes moved in its memory, bytes sent by it, seconds that nothing shortens."""

    flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    waits: float = 0.0
    seconds: float = field(default=0.0, init=False)

    def finish(self, hardware: Hardware, between: float) -> Phase:
        """Fill in `seconds`: products and memory overlap, the network does not. between: bytes a second of it."""
        compute = self.flops / (hardware.flops * COMPUTE_SHARE)
        memory = self.bytes / (hardware.bandwidth * BANDWIDTH_SHARE)
        self.seconds = max(compute, memory, self.waits) + self.sent / (between * BANDWIDTH_SHARE)
        return self


def work_of(setting: Setting) -> dict[str, Phase]:
    """Phases of a step by name, on one rank."""
    hardware = setting.hardware
    phases = {"student": student_work(setting), "update": update_work(setting.student, setting)}
    if setting.method == "promptkd":
        phases = {"rollout": rollout_work(setting), "prompt": prompt_work(setting), **phases}
    # Ranks of several machines meet at the slowest link; tensor parallelism stays inside one (launchers number so).
    between = hardware.link if hardware.ranks <= hardware.per_node else min(hardware.link, hardware.network)
    return {name: phase.finish(hardware, between) for name, phase in phases.items()}


def forward(shape: Shape, tokens: float, length: float) -> float:
    """Operations of the layers for `tokens` tokens in sequences of `length`; each sees half of its sequence."""
    return tokens * (2 * shape.layers * shape.layer_matrices + 4 * shape.layers * shape.queries * length / 2)


def head(shape: Shape, tokens: float) -> float:
    return 2 * tokens * shape.head


def _lengths(setting: Setting) -> tuple[float, float, float]:
    """Mean sequence; the window's tokens and response tokens of one rank."""
    length = setting.mean_prompt + setting.mean_response
    return length, setting.rows * length, setting.rows * setting.mean_response


def rollout_work(setting: Setting) -> Phase:
    """Prefill, then a token at a time: every one of them reads all weights once for the rows that are left."""
    student, shape, b = setting.student, setting.student.shape, setting.student.size
    length, tokens, responses = _lengths(setting)
    groups = -(-setting.rows // decoding_rows(setting, student, setting.rows))
    steps = groups * setting.max_new  # one row of many goes to the limit
    cache = 2 * shape.layers * shape.keys * b * responses * (setting.mean_prompt + setting.mean_response / 2)
    phase = Phase(
        (forward(shape, tokens, length) / student.tensor) + head(shape, responses),
        b * steps * (student.parameters) + cache / student.tensor,
        tensor_traffic(student, tokens, 2),
    )
    if not setting.hardware.cpu:
        phase.waits = steps * shape.layers * LAYER_SECONDS
    if student.stage == 3:
        phase.sent += sharded(student, setting, 1)
    return phase


def prompt_work(setting: Setting) -> Phase:
    """Teacher forward without and with the prompt (twice with checkpointing), backward to its inputs; both heads."""
    teacher, student = setting.teacher, setting.student
    length, tokens, responses = _lengths(setting)
    prompted = tokens + setting.rows * teacher.prompt
    times, passes = 3 if teacher.checkpointing else 2, setting.micro_batches(length)
    body = forward(teacher.shape, tokens, length) + times * forward(teacher.shape, prompted, length + teacher.prompt)
    heads = 3 * head(teacher.shape, responses) + head(student.shape, responses)
    phase = Phase(body / teacher.tensor + heads, (1 + times) * passes * teacher.size * teacher.parameters)
    phase.sent = tensor_traffic(teacher, tokens + times * prompted, 2)
    if teacher.stage == 3:
        phase.sent += sharded(teacher, setting, (1 + times) * passes)
    return phase


def student_work(setting: Setting) -> Phase:
    """Teacher forward, student forward and backward (forward twice with checkpointing), both heads."""
    student, teacher = setting.student, setting.teacher
    length, tokens, responses = _lengths(setting)
    times, passes = 4 if student.checkpointing else 3, setting.micro_batches(length)
    phase = Phase(
        times * forward(student.shape, tokens, length) / student.tensor + 3 * head(student.shape, responses),
        times * passes * student.size * student.parameters,
        tensor_traffic(student, times * tokens, 2),
    )
    if teacher is not None:
        prompted = tokens + setting.rows * teacher.prompt
        phase.flops += forward(teacher.shape, prompted, length) / teacher.tensor + head(teacher.shape, responses)
        phase.bytes += passes * teacher.size * teacher.parameters
        phase.sent += tensor_traffic(teacher, prompted, 2)
        if teacher.stage == 3:
            phase.sent += sharded(teacher, setting, passes)
    if student.stage == 3:
        phase.sent += sharded(student, setting, 3 * passes)  # weights for both passes, gradients once
    elif student.stage == 2:
        phase.sent += 2 * sharded(student, setting, passes)  # all-reduce of each micro-batch's gradients
    else:
        phase.sent += 2 * sharded(student, setting, 1)  # all-reduce of the window's gradients
    return phase


def update_work(student: Engine, setting: Setting) -> Phase:
    """AdamW reads and writes masters and moments, reads gradients; ranks then fetch each other's weights."""
    hardware, share = setting.hardware, student.trained / setting.data_ranks(student)
    moved = (2 * 12 + 4 + student.size) * share
    phase = Phase(flops=12 * share, bytes=moved)
    if student.stage in (1, 2):
        phase.sent = sharded(student, setting, 1)
    if student.offload_optimizer and not hardware.cpu:
        across = 2 * student.size * share / (hardware.link * BANDWIDTH_SHARE)
        phase.bytes, phase.waits = 0.0, across + moved * min(hardware.ranks, hardware.per_node) / HOST_BANDWIDTH
    return phase


def sharded(engine: Engine, setting: Setting, times: float) -> float:
    """Bytes a rank sends when all of a model is gathered, or its gradients are scattered, `times` times."""
    ranks = setting.data_ranks(engine)
    return times * engine.size * engine.parameters * (ranks - 1) / ranks


def tensor_traffic(engine: Engine, tokens: float, per_layer: int) -> float:
    """All-reduces of a layer's sums among tensor-parallel ranks: `per_layer` of them a pass."""
    share = 2 * (engine.tensor - 1) / engine.tensor
    return per_layer * engine.shape.layers * share * tokens * engine.shape.width * engine.size
