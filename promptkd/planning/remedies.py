"""Find the options that make a run fit: single ones, or else a combination."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from promptkd.planning.decoding import decoding_rows
from promptkd.planning.held import GPU_HEADROOM
from promptkd.planning.memory import Memory, memory_of
from promptkd.planning.setting import Setting, tensor_sizes

Change = tuple[str, Setting]
Remedy = Callable[[Setting], Iterator[Change]]


def fits(setting: Setting, memory: Memory | None = None) -> bool:
    """Whether a rank's peak fits into its device. On a CPU all ranks of a machine share its memory."""
    peak, hardware = (memory or memory_of(setting)).peak, setting.hardware
    if hardware.cpu:
        return peak * min(hardware.ranks, hardware.per_node) <= hardware.memory
    return peak <= hardware.memory * GPU_HEADROOM


def remedies(setting: Setting) -> list[tuple[str, float]]:
    """List (options, peak bytes) that make the run fit.

    Returns:
        Every single option that suffices, in its mildest value. If none does, the first combination, or nothing.
    """
    sufficient = [next((change for change in remedy(setting) if fits(change[1])), None) for remedy in REMEDIES]
    if single := [(text, memory_of(changed).peak) for text, changed in filter(None, sufficient)]:
        return single
    # Tensor parallelism and ZeRO-3 exclude each other, so that a combination leaves one of them out.
    return _combined(setting, _tensor) or _combined(setting, _stages)


def _combined(setting: Setting, left_out: Remedy) -> list[tuple[str, float]]:
    """Apply one remedy after the other until the run fits, each with the value that saves most."""
    texts: list[str] = []
    for remedy in REMEDIES:
        if remedy is left_out:
            continue
        best, least = setting, memory_of(setting).peak
        for text, changed in remedy(setting):
            peak = memory_of(changed).peak
            if fits(changed):
                return [(", ".join([*texts, text]), peak)]
            if peak < least:
                best, least, best_text = changed, peak, text
        if best is not setting:
            setting = best
            texts.append(best_text)
    return []


def _halved(rows: int, length: int) -> Iterator[int]:
    """Yield token budgets of half the rows, a quarter, and so on down to one row."""
    while rows > 1:
        rows = (rows + 1) // 2
        yield rows * length


def _budgets(setting: Setting) -> Iterator[Change]:
    for budget in _halved(setting.micro_rows(), setting.length):
        yield f"--token-budget {budget}", replace(setting, token_budget=budget)


def _rollouts(setting: Setting) -> Iterator[Change]:
    rows = decoding_rows(setting, setting.student, max(setting.rows, setting.dev_rows))
    for budget in _halved(rows, setting.length):
        yield f"--rollout-token-budget {budget}", replace(setting, rollout_token_budget=budget)


def _checkpointing(setting: Setting) -> Iterator[Change]:
    if not setting.student.checkpointing:
        yield "--gradient-checkpointing", _both(setting, checkpointing=True)


def _stages(setting: Setting) -> Iterator[Change]:
    for stage in range(max(2, setting.student.stage + 1), 4):
        if setting.hardware.ranks // setting.tensor > 1 and (stage < 3 or setting.tensor == 1):
            yield f"ZeRO stage {stage} (--deepspeed_config)", _both(setting, stage=stage)


def _tensor(setting: Setting) -> Iterator[Change]:
    engines = [engine for engine in (setting.student, setting.teacher) if engine]
    if any(engine.stage == 3 for engine in engines):
        return
    sizes = (tensor_sizes(engine.shape, setting.hardware.ranks) for engine in engines)
    for size in sorted(set.intersection(*map(set, sizes))):
        if setting.tensor < size <= setting.hardware.per_node:
            # The effective batch size stays the same: fewer groups, each with more examples.
            rows = setting.rows * size // setting.tensor
            teacher = replace(setting.teacher, tensor=size) if setting.teacher else None
            student = replace(setting.student, tensor=size)
            changed = replace(setting, student=student, teacher=teacher, rows=rows)
            yield f"--model-parallel --model-parallel-size {size}", changed


def _offload(setting: Setting) -> Iterator[Change]:
    if setting.hardware.cpu:
        return
    if not setting.student.offload_optimizer:
        student = replace(setting.student, offload_optimizer=True, stage=max(setting.student.stage, 1))
        yield "offload_optimizer to the CPU (--deepspeed_config)", replace(setting, student=student)
    if setting.student.stage == 3:
        changed = _both(setting, offload_optimizer=True, offload_parameters=True)
        yield "offload_optimizer and offload_param to the CPU (--deepspeed_config)", changed


def _both(setting: Setting, **fields: Any) -> Setting:
    """Change both engines. A frozen teacher (KD) has no engine to change."""
    teacher = setting.teacher
    if teacher is not None and teacher.trained:
        teacher = replace(teacher, **fields)
    return replace(setting, student=replace(setting.student, **fields), teacher=teacher)


REMEDIES: tuple[Remedy, ...] = (_budgets, _rollouts, _checkpointing, _stages, _tensor, _offload)
