"""Show a plan as text, and as a dictionary for --json."""

from __future__ import annotations

from typing import Any

from promptkd.planning.decoding import decoding_rows
from promptkd.planning.memory import Memory, memory_of
from promptkd.planning.remedies import fits, remedies
from promptkd.planning.setting import Engine, Setting
from promptkd.utils.format import format_bytes
from promptkd.utils.tables import Table


def plan_of(setting: Setting) -> dict[str, Any]:
    """Return the content of the text, with sizes in bytes."""
    memory = memory_of(setting)
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
        "framework": memory.framework,
        "held": dict(memory.held),
        "phases": {name: dict(parts) for name, parts in memory.phases.items()},
        "start": memory.start,
        "host": dict(memory.host),
        "host_while_loading": host_while_loading(setting, memory),
        "peak": memory.peak,
        "fits": enough,
        "remedies": [] if enough else [{"options": text, "peak": peak} for text, peak in remedies(setting)],
        "steps": setting.steps,
    }


def _engine(engine: Engine, setting: Setting) -> dict[str, Any]:
    return {
        "config": engine.shape.path,
        "parameters": engine.shape.parameters(),
        "trained": engine.trained,
        "precision": engine.kind,
        "zero_stage": engine.stage,
        "offload": [name for name in ("optimizer", "parameters") if getattr(engine, f"offload_{name}")],
        "tensor_parallel": engine.tensor,
        "data_parallel": setting.data_ranks(engine),
    }


def host_while_loading(setting: Setting, memory: Memory) -> float:
    """Return the main memory that one machine with GPUs needs while the models load.

    Every rank holds both models, the student in float32. Of a teacher under ZeRO-3 it holds what is outside of the
    layers (models/deferred.py).
    """
    if setting.hardware.cpu:
        return 0.0
    teacher = setting.teacher.weights if setting.teacher else 0
    if setting.teacher and setting.teacher.stage == 3:
        teacher = setting.teacher.size * setting.teacher.shape.embeddings
    ranks = min(setting.hardware.ranks, setting.hardware.per_node)
    return ranks * (4 * setting.student.parameters + teacher + memory.host.total())


def text_of(plan: dict[str, Any], cpu: bool) -> str:
    """Format a plan: models, memory by phase, whether it fits, and the options that make it fit."""
    device = "rank" if cpu else "GPU"
    count = f"{plan['ranks']} {device}s" if plan["ranks"] > 1 else f"one {device}"
    longest = plan["longest"]
    passes = "1 forward pass" if plan["micro_batches"] == 1 else f"{plan['micro_batches']} forward passes"
    lines = [
        f"{plan['method']} on {count}",
        *(_model_line(name, model) for name, model in plan["models"].items()),
        f"step      {plan['examples_per_step']} examples ({plan['steps']:,} steps in total), "
        f"{plan['rows_per_rank']} on each data-parallel rank; longest: "
        f"{longest['prompt']} + {longest['response']} tokens in {passes} of at most "
        f"{plan['token_budget']:,}",
        f"          {plan['decoded_together']} answers decoded together",
        "",
        f"memory of one {device}, GB" + ("" if cpu else " (gradients and buffers at their fullest)"),
        _memory_table(plan).text(),
        f"peak while loading: {format_bytes(plan['start'])}",
    ]
    if plan["host"]:
        lines.append("offloaded: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in plan["host"].items()))
    lines += ["", _verdict(plan, cpu), *(f"  {r['options']}: {r['peak'] / 1e9:.1f} GB" for r in plan["remedies"])]
    if not plan["fits"] and not plan["remedies"]:
        lines.append("  no option or combination of options suffices: use more or larger devices, or a smaller model")
    if not cpu:
        lines.append(f"main memory of each machine: {format_bytes(plan['host_while_loading'])} while the models load")
    return "\n".join(lines)


def _model_line(name: str, model: dict[str, Any]) -> str:
    frozen = model["trained"] == 0
    traits = [model["precision"]]
    traits += ["frozen"] if frozen else [f"ZeRO {model['zero_stage']} over {model['data_parallel']} ranks"]
    traits += [f"tensor parallel {model['tensor_parallel']}"] if model["tensor_parallel"] > 1 else []
    traits += [f"{part} offloaded" for part in model["offload"]]
    return f"{name:9} {model['parameters'] / 1e6:,.0f}M parameters ({model['config']}), {', '.join(traits)}"


def _memory_table(plan: dict[str, Any]) -> Table:
    """Build the table of what each phase holds, in GB."""
    phases = plan["phases"].values()
    held = {"framework": plan["framework"], **plan["held"]}
    sizes = {name: [size] * len(phases) for name, size in held.items() if size}
    for name in dict.fromkeys(name for parts in phases for name, size in parts.items() if size):
        sizes[name] = [parts.get(name, 0) for parts in phases]
    sizes["total"] = [sum(column) for column in zip(*sizes.values())]
    table = Table(["", *plan["phases"]])
    for name, values in sizes.items():
        table.add(name, *(f"{value / 1e9:.2f}" for value in values))
    return table


def _verdict(plan: dict[str, Any], cpu: bool) -> str:
    owner = "all ranks share" if cpu else "a GPU has"
    verb = "fits" if plan["fits"] else "DOES NOT FIT"
    line = f"peak {plan['peak'] / 1e9:.2f} GB: {verb}, {owner} {plan['memory_per_device'] / 1e9:.4g} GB"
    if not cpu:
        line += " (5 % of which are kept for fragmentation)"
    return line if plan["fits"] else line + ("; what makes it fit:" if plan["remedies"] else "")
