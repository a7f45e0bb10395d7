"""Format results of exposure bias: results.md and a figure of the curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from promptkd.evaluation.tables import protocol_line
from promptkd.utils.plotting import plain_text, shown
from promptkd.utils.tables import Table


def markdown(results: dict[str, Any]) -> str:
    """Format results.md: a line for each set with the values at the last position, then the protocol."""
    teacher, protocol = results["teacher"], results["protocol"]
    prompted = f" with the prompt {teacher['prompt']}" if teacher["prompt"] else ""
    table = Table(["set", "rows", "excess accumulated error, %", "95 % interval", "R", "eps", "seconds"])
    for name, entry in results["sets"].items():
        table.add(*_cells(name, entry))
    for lost in results["missing"]:
        table.add(lost["name"], "missing")
    lines = [
        f"# Exposure bias of {results['model']['path']}",
        "",
        table.markdown(),
        "",
        f"Teacher: {teacher['path']}{prompted}. R and eps: KL(teacher || student) accumulated over "
        f"{protocol['max_length'] - protocol['max_prompt_length']} response tokens, on answers of the student and of "
        f"the teacher; excess: (R - eps) / eps. Each model answers a prompt {protocol['sample_times']} x. The interval "
        "resamples rows." + (" The published code's arithmetic." if protocol["published"] else ""),
        "",
        protocol_line(results),
    ]
    return "\n".join(lines) + "\n"


def _cells(name: str, entry: dict[str, Any]) -> list[str]:
    if entry["partial"]:
        name += f" (partial: {entry['rows']:,} of {entry['published_rows']:,})"
    excess, low, high = (
        "-" if entry[key] is None else f"{entry[key]:.2f}"
        for key in ("ex_acc_err", "ex_acc_err_low", "ex_acc_err_high")
    )
    sums = [f"{entry[key]:.4g}" for key in ("mean_R", "mean_eps")]
    return [name, f"{entry['rows']:,}", excess, f"{low} to {high}", *sums, f"{entry['seconds']:.1f}"]


@plain_text()
def draw(values: dict[str, list[float | None]], picture: Path, title: str) -> None:
    """Draw the excess with its interval, and R and eps beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {name: np.array(curve, dtype=float) for name, curve in values.items()}
    tokens = np.arange(1, len(curves["mean_R"]) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    left.fill_between(tokens, curves["ex_acc_err_low"], curves["ex_acc_err_high"], color="#0072B2", alpha=0.2, lw=0)
    left.plot(tokens, curves["ex_acc_err"], color="#0072B2", lw=1.6)
    left.axhline(0, color="#777777", lw=0.8)
    left.set(title="excess accumulated error, 95 % interval over rows", ylabel="%")
    right.plot(tokens, curves["mean_R"], color="#D55E00", lw=1.6, label="R: on the student's answers")
    right.plot(tokens, curves["mean_eps"], color="#009E73", lw=1.6, ls="--", label="eps: on the teacher's answers")
    right.set(title="accumulated KL(teacher || student)", ylabel="nats")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    for axis in (left, right):
        axis.set_xlabel("response token")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(shown(title))
    figure.savefig(picture, dpi=130)
    plt.close(figure)
