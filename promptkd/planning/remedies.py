"""Which option makes a run fit that does not: each alone, then together in the order of what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from promptkd.planning.decoding import decoding_rows
from promptkd.planning.held import GPU_HEADROOM
from promptkd.planning.memory import Memory, memory_of
from promptkd.planning.setting import Engine, Setting, tensor_sizes

Change = tuple[str, Setting]


def fits(setting: Setting, memory: Memory | None = None) -> bool:
    """Whether a rank's peak is within its device; on a CPU all ranks of a machine share its memory."""
    peak = (memory or memory_of(setting)).peak
    hardware = setting.hardware
    if hardware.cpu:
        peak *= min(hardware.ranks, hardware.per_node)
    return peak <= hardware.memory * (1.0 if hardware.cpu else GPU_HEADROOM)


def remedies(setting: Setting) -> list[tuple[str, float]]:
    """(options, peak bytes) that make it fit: single ones, else the first combination that does; else nothing."""
    found = []
    for step in STEPS:
        for text, changed in step(setting):
            memory = memory_of(changed)
            if fits(changed, memory):
                found.append((text, memory.peak))
                break  # the mildest of its kind
    return found or _together(setting)


def _together(setting: Setting) -> list[tuple[str, float]]:
    """Apply one kind after the other, each as mildly as suffices or else as strongly as it goes."""
    for left_out in (_tensor, _stages):  # tensor parallelism and ZeRO-3 exclude each other
        if found := _in_order(setting, [step for step in STEPS if step is not left_out]):
            return found
    return []


def _in_order(setting: Setting, steps: Sequence[Callable[[Setting], Iterator[Change]]]) -> list[tuple[str, float]]:
    texts: list[str] = []
    for step in steps:
        best = None
        for text, changed in step(setting):
            memory = memory_of(changed)
            if best is None or memory.peak < best[2]:
                best = text, changed, memory.peak
            if fits(changed, memory):
                return [(", ".join([*texts, text]), memory.peak)]
        if best is not None and best[2] < memory_of(setting).peak:
            texts.append(best[0])
            setting = best[1]
    return []


def _budgets(setting: Setting) -> Iterator[Change]:
    rows = setting.micro_rows()
    while rows > 1:
        rows = (rows + 1) // 2
        budget = rows * setting.length
        yield f"--token-budget {budget}", replace(setting, token_budget=budget)


def _rollouts(setting: Setting) -> Iterator[Change]:
    rows = decoding_rows(setting, setting.student, max(setting.rows, setting.dev_rows))
    while rows > 1:
        rows = (rows + 1) // 2
        budget = rows * setting.length
        yield f"--rollout-token-budget {budget}", replace(setting, rollout_token_budget=budget)


def _checkpointing(setting: Setting) -> Iterator[Change]:
    if not setting.student.checkpointing:
        yield "--gradient-checkpointing", _each(setting, lambda engine: replace(engine, checkpointing=True))


def _stages(setting: Setting) -> Iterator[Change]:
    for stage in range(max(2, setting.student.stage + 1), 4):
        if setting.hardware.ranks // setting.tensor > 1 and (stage < 3 or setting.tensor == 1):
            yield f"ZeRO stage {stage} (--deepspeed_config)", _each(setting, lambda e, s=stage: replace(e, stage=s))


def _tensor(setting: Setting) -> Iterator[Change]:
    engines = [engine for engine in (setting.student, setting.teacher) if engine]
    ranks = setting.hardware.ranks
    sizes = set.intersection(*(set(tensor_sizes(engine.shape, ranks)) for engine in engines))
    for size in sorted(sizes):
        stages = {engine.stage for engine in engines}
        if setting.tensor < size <= setting.hardware.per_node and 3 not in stages:  # they do not go together
            # The effective batch stays: fewer groups, each with more rows.
            rows = setting.rows * size // setting.tensor
            changed = replace(_each(setting, lambda e, n=size: replace(e, tensor=n), always=True), rows=rows)
            yield f"--model-parallel --model-parallel-size {size}", changed


def _offload(setting: Setting) -> Iterator[Change]:
    if setting.hardware.cpu:
        return
    if not setting.student.offload_optimizer:
        student = replace(setting.student, offload_optimizer=True, stage=max(setting.student.stage, 1))
        yield "offload_optimizer to the CPU (--deepspeed_config)", replace(setting, student=student)
    if setting.student.stage == 3:

        def offload(engine: Engine) -> Engine:
            return replace(engine, offload_optimizer=True, offload_parameters=True)

        yield "offload_optimizer and offload_param to the CPU (--deepspeed_config)", _each(setting, offload)


def _each(setting: Setting, change: Callable[[Engine], Engine], always: bool = False) -> Setting:
    """The same change to both engines; a teacher that is no engine (KD) has no ZeRO to change."""
    teacher = setting.teacher
    if teacher is not None and (always or teacher.trained):
        teacher = change(teacher)
    return replace(setting, student=change(setting.student), teacher=teacher)


STEPS = (_budgets, _rollouts, _checkpointing, _stages, _tensor, _offload)
