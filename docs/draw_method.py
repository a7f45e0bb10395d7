"""Draws docs/method.png: one optimizer step of PromptKD. Run: python docs/draw_method.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TEACHER, STUDENT, PROMPT, TEXT = "#cfe3f2", "#fbe3cf", "#0072B2", "#222222"


def box(axis, x, y, width, height, text, colour, edge="#555555"):
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", fc=colour, ec=edge, lw=1.3)
    axis.add_patch(shape)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10, color=TEXT)


def arrow(axis, start, end, text="", colour="#555555", style="-|>", offset=(0, 0.12), dashed=False):
    line = "--" if dashed else "-"
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=14, color=colour, lw=1.5, ls=line))
    if text:
        x, y = (start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1]
        axis.text(x, y, text, ha="center", va="center", fontsize=9, color=colour)


def title(axis, text, note):
    axis.text(2, 4.75, text, ha="center", fontsize=12, weight="bold", color=TEXT)
    axis.text(2, 4.38, note, ha="center", fontsize=9, color="#555555")


def prompted_teacher(axis, x, y):
    box(axis, x, y, 0.42, 0.8, "P", PROMPT)
    axis.texts[-1].set_color("white")
    box(axis, x + 0.5, y, 1.25, 0.8, "teacher\n(frozen)", TEACHER)


def main() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9))
    for axis in axes:
        axis.set(xlim=(0, 4), ylim=(0.7, 5.1))
        axis.axis("off")
    first, second, third = axes

    title(first, "1  Pseudo-target generation", "the student answers every prompt of the window")
    box(first, 0.15, 2.1, 1.0, 0.8, "prompts", "#eeeeee")
    box(first, 1.55, 2.1, 1.0, 0.8, "student", STUDENT)
    box(first, 2.95, 2.1, 0.95, 0.8, "responses\n$y$", "#eeeeee")
    arrow(first, (1.2, 2.5), (1.5, 2.5))
    arrow(first, (2.6, 2.5), (2.9, 2.5))

    title(second, "2  Prompt tuning", "gradient to P alone, one AdamW step")
    prompted_teacher(second, 0.1, 2.1)
    box(second, 2.75, 3.1, 1.1, 0.8, "student $q$", STUDENT)
    box(second, 2.75, 1.1, 1.1, 0.8, "teacher $p$\n(no prompt)", TEACHER)
    arrow(second, (1.95, 2.65), (2.7, 3.45), "KL($p_P$ || $q$)", offset=(-0.55, 0.22))
    arrow(second, (1.95, 2.35), (2.7, 1.55), "(1 - t/T) KL($p_P$ || $p$)", offset=(-0.35, -0.62))
    arrow(second, (1.0, 2.0), (0.32, 2.0), "gradient", PROMPT, offset=(0, -0.2), dashed=True)

    title(third, "3  Student distillation", "with the updated P; gradient to the student alone")
    box(third, 0.15, 2.1, 1.15, 0.8, "student $q$", STUDENT)
    prompted_teacher(third, 2.15, 2.1)
    arrow(third, (2.1, 2.5), (1.35, 2.5), "KL($q$ || $p_P$)", offset=(0, 0.65))
    arrow(third, (1.2, 2.0), (0.3, 2.0), "gradient", "#D55E00", offset=(0, -0.2), dashed=True)

    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("method.png"), dpi=110)


if __name__ == "__main__":
    main()
