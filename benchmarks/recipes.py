"""Print the table of the paper's recipes in docs/distributed.md, with one call of tools/plan.py for each row.

python benchmarks/recipes.py
"""

from __future__ import annotations

from pathlib import Path

from promptkd.cli.plan import make
from promptkd.planning.show import plan_of
from promptkd.utils.tables import Table

ROOT = Path(__file__).parents[1]

RECIPES = {  # row -> script, GPUs, kind of GPU
    "GPT-2 base <- XL, 8 x 3090": ("gpt2/promptkd/promptkd_base.sh", 8, "3090"),
    "GPT-2 medium <- XL, 8 x 3090": ("gpt2/promptkd/promptkd_medium.sh", 8, "3090"),
    "GPT-2 large <- XL, 8 x 3090": ("gpt2/promptkd/promptkd_large.sh", 8, "3090"),
    "OPT 1.3B <- 13B, 4 x A100": ("opt/promptkd/promptkd_1.3B.sh", 4, "a100"),
    "OPT 2.7B <- 13B, 4 x A100": ("opt/promptkd/promptkd_2.7B.sh", 4, "a100"),
    "OPT 6.7B <- 13B, 4 x A100": ("opt/promptkd/promptkd_6.7B.sh", 4, "a100"),
    "Llama 7B <- 13B, 4 x A100": ("llama/promptkd/promptkd_7B.sh", 4, "a100"),
}
PHASES = ("rollout", "prompt", "student", "update", "evaluation")


def cells(script: str, gpus: int, kind: str) -> list[str]:
    """Plan one recipe: GB in each phase, whether it fits, and its steps."""
    plan = plan_of(make(["--script", str(ROOT / "scripts" / script), "--gpus", str(gpus), "--gpu", kind])[0])
    throughout = plan["framework"] + sum(plan["held"].values())
    sizes = [f"{(throughout + sum(plan['phases'][phase].values())) / 1e9:.1f}" for phase in PHASES]
    return [*sizes, "yes" if plan["fits"] else "no", f"{plan['steps']:,}"]


def main() -> None:
    table = Table(["recipe", *(f"{phase} GB" for phase in PHASES), "fits", "steps"])
    for name, recipe in RECIPES.items():
        table.add(name, *cells(*recipe))
    print(table.markdown())


if __name__ == "__main__":
    main()
