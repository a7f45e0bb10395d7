"""A plan as text for people and as a dictionary for machines."""

from __future__ import annotations

from typing import Any

from promptkd.planning.decoding import decoding_rows
from promptkd.planning.memory import Memory, memory_of
from promptkd.planning.remedies import fits, remedies
from promptkd.planning.setting import Engine, Setting
from promptkd.planning.units import BANDWIDTH_SHARE, COMPUTE_SHARE, duration, short
from promptkd.planning.work import Phase, work_of


def plan_of(setting: Setting) -> dict[str, Any]:
    """Everything the text says, in bytes, operations and seconds."""
    memory, work = memory_of(setting), work_of(setting)
    seconds = sum(phase.seconds for phase in work.values())
    hardware, enough = setting.hardware, fits(setting, memory)
    engines = {"student": setting.student, "teacher": setting.teacher}
    return {
        "method": setting.method,
        "models": {name: _engine(engine, setting) for name, engine in engines.items() if engine},
        "ranks": hardware.ranks,
        "memory_per_device": hardware.memory,
        "examples_per_step": setting.rows * (hardware.ranks // setting.tensor),
        "rows_per_rank": setting.rows,
        "micro_batches": setting.micro_batches(),
        "token_budget": setting.token_budget,
        "decoded_together": decoding_rows(setting, setting.student, setting.rows),
        "longest": {"prompt": setting.max_prompt, "response": setting.max_new},
        "mean": {"prompt": setting.mean_prompt, "response": setting.mean_response},
        "framework": memory.framework,
        "held": dict(memory.held),
        "phases": {name: dict(parts) for name, parts in memory.phases.items()},
        "start": memory.start,
        "host": dict(memory.host),
        "host_while_loading": host_while_loading(setting, memory),
        "peak": memory.peak,
        "fits": enough,
        "remedies": [] if enough else [{"options": text, "peak": peak} for text, peak in remedies(setting)],
        "work": {name: vars(phase) for name, phase in work.items()},
        "seconds_per_step": seconds,
        "steps": setting.steps,
        "hours": seconds * setting.steps / 3600,
        "device_hours": seconds * setting.steps * hardware.ranks / 3600,
    }


def _engine(engine: Engine, setting: Setting) -> dict[str, Any]:
    return {
        "config": engine.shape.path,
        "parameters": engine.shape.parameters(),
        "trained": engine.trained,
        "precision": engine.kind,
        "zero_stage": engine.stage,
        "offload": [n for n in ("optimizer", "parameters") if getattr(engine, f"offload_{n}")],
        "tensor_parallel": engine.tensor,
        "data_parallel": setting.data_ranks(engine),
    }


def host_while_loading(setting: Setting, memory: Memory) -> float:
    """Memory of a machine with GPUs while models are read: every rank holds both, the student in float32, of a
    teacher that ZeRO-3 shares out what is outside of its layers (build.py)."""
    if setting.hardware.cpu:
        return 0.0
    teacher = setting.teacher.weights if setting.teacher else 0
    if setting.teacher and setting.teacher.stage == 3:
        teacher = setting.teacher.size * setting.teacher.shape.embeddings
    ranks = min(setting.hardware.ranks, setting.hardware.per_node)
    return ranks * (4 * setting.student.parameters + teacher + memory.host.total())


def text_of(plan: dict[str, Any], cpu: bool) -> str:
    """The plan for people: models, memory by phase, whether it fits, work and time."""
    device = "rank" if cpu else "GPU"
    lines = [
        f"{plan['method']} on {plan['ranks']} {device}s" if plan["ranks"] > 1 else f"{plan['method']} on one {device}"
    ]
    lines += [_model_line(name, model) for name, model in plan["models"].items()]
    longest, mean = plan["longest"], plan["mean"]
    lines += [
        f"step      {plan['examples_per_step']} examples, {plan['rows_per_rank']} on each data-parallel rank; longest: "
        f"{longest['prompt']} + {longest['response']} tokens in {plan['micro_batches']} forward passes of at most "
        f"{plan['token_budget']}",
        f"          {plan['decoded_together']} answers decoded together",
        "",
        f"memory of one {device}, GB" + ("" if cpu else " (gradients and buffers at their fullest)"),
    ]
    lines += _memory_lines(plan)
    lines += ["", _verdict(plan, cpu), *(f"  {r['options']}: {r['peak'] / 1e9:.1f} GB" for r in plan["remedies"])]
    if not plan["fits"] and not plan["remedies"]:
        lines.append("  no option alone or together: more or larger devices, or a smaller model")
    if not cpu:
        lines.append(f"each machine's own memory: {short(plan['host_while_loading'])} while models are loaded")
    lines += ["", *_work_lines(plan, mean, device)]
    return "\n".join(lines)


def _model_line(name: str, model: dict[str, Any]) -> str:
    how = f"{model['precision']}, ZeRO {model['zero_stage']} over {model['data_parallel']} ranks"
    if model["trained"] == 0:
        how = f"{model['precision']}, frozen"
    how += f", tensor parallel {model['tensor_parallel']}" if model["tensor_parallel"] > 1 else ""
    how += "".join(f", {part} offloaded" for part in model["offload"])
    return f"{name:9} {model['parameters'] / 1e6:,.0f}M parameters ({model['config']}), {how}"


def _memory_lines(plan: dict[str, Any]) -> list[str]:
    phases = plan["phases"]
    names = list(dict.fromkeys(name for parts in phases.values() for name, size in parts.items() if size))
    rows = [("framework", [plan["framework"]] * len(phases))]
    rows += [(name, [size] * len(phases)) for name, size in plan["held"].items() if size]
    rows += [(name, [parts.get(name, 0) for parts in phases.values()]) for name in names]
    rows.append(("in all", [sum(column) for column in zip(*(values for _, values in rows))]))
    lines = [f"{'':24}" + "".join(f"{name:>11}" for name in phases)]
    lines += [f"{name:24}" + "".join(f"{value / 1e9:11.2f}" for value in values) for name, values in rows]
    lines.append(f"{'engines are made with':24}{plan['start'] / 1e9:11.2f}")
    if plan["host"]:
        lines.append("offloaded: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan["host"].items()))
    return lines


def _verdict(plan: dict[str, Any], cpu: bool) -> str:
    what = "all ranks share" if cpu else "a GPU has"
    verb = "fits" if plan["fits"] else "DOES NOT FIT"
    line = f"peak {plan['peak'] / 1e9:.2f} GB: {verb}, {what} {plan['memory_per_device'] / 1e9:.4g} GB"
    if not cpu:
        line += " (5 % of them left to fragments)"
    return line if plan["fits"] else line + ("; what makes it fit:" if plan["remedies"] else "")


def _work_lines(plan: dict[str, Any], mean: dict[str, float], device: str) -> list[str]:
    lines = [
        f"one step on each {device} (on average {mean['prompt']:g} tokens of prompt, {mean['response']:g} of response)",
        f"{'':10}{'operations':>12}{'memory':>12}{'sent':>12}{'time':>10}",
    ]
    for name, phase in plan["work"].items():
        lines.append(_work_line(name, phase))
    total = plan["device_hours"]
    lines += [
        f"{'step':10}{'':36}{duration(plan['seconds_per_step']):>10}",
        f"{plan['steps']} steps: {duration(plan['hours'] * 3600)}, {total:.3g} {device}-hours, evaluations apart",
        f"(an estimate: {COMPUTE_SHARE:.0%} of peak operations, {BANDWIDTH_SHARE:.0%} of peak bandwidths)",
    ]
    return lines


def _work_line(name: str, phase: dict[str, float] | Phase) -> str:
    return (
        f"{name:10}{short(phase['flops'], 'FLOP'):>12}{short(phase['bytes']):>12}{short(phase['sent']):>12}"
        f"{duration(phase['seconds']):>10}"
    )
