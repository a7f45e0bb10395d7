"""Draw docs/method.png: one optimizer step of PromptKD. Run: python docs/draw_method.py"""

from pathlib import Path

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from promptkd.utils.plotting import COLORS, new_figure

TEACHER, STUDENT, PLAIN, TEXT, EDGE = "#cfe3f2", "#fbe3cf", "#eeeeee", "#222222", "#555555"
PROMPT, GRADIENT = COLORS[0], COLORS[4]


def box(axis, x, y, width, height, text, color):
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", fc=color, ec=EDGE, lw=1.3)
    axis.add_patch(shape)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10, color=TEXT)


def arrow(axis, start, end, text="", color=EDGE, offset=(0, 0.12), dashed=False):
    line = "--" if dashed else "-"
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=color, lw=1.5, ls=line))
    if text:
        x, y = (start[0] + end[0]) / 2 + offset[0], (start[1] + end[1]) / 2 + offset[1]
        axis.text(x, y, text, ha="center", va="center", fontsize=9, color=color)


def title(axis, text, note):
    axis.text(2, 4.75, text, ha="center", fontsize=12, weight="bold", color=TEXT)
    axis.text(2, 4.38, note, ha="center", fontsize=9, color=EDGE)


def prompted_teacher(axis, x, y):
    box(axis, x, y, 0.42, 0.8, "P", PROMPT)
    axis.texts[-1].set_color("white")
    box(axis, x + 0.5, y, 1.25, 0.8, "teacher\n(frozen)", TEACHER)


def main() -> None:
    style = {"figure.dpi": 110, "text.parse_math": True}
    with new_figure((13, 3.9), columns=3, style=style) as (figure, grid):
        for axis in grid[0]:
            axis.set(xlim=(0, 4), ylim=(0.7, 5.1))
            axis.axis("off")
        first, second, third = grid[0]

        title(first, "1  Pseudo-target generation", "the student answers every prompt of the step")
        box(first, 0.15, 2.1, 1.0, 0.8, "prompts", PLAIN)
        box(first, 1.55, 2.1, 1.0, 0.8, "student", STUDENT)
        box(first, 2.95, 2.1, 0.95, 0.8, "responses\n$y$", PLAIN)
        arrow(first, (1.2, 2.5), (1.5, 2.5))
        arrow(first, (2.6, 2.5), (2.9, 2.5))

        title(second, "2  Prompt tuning", "gradient to P only, one AdamW step")
        prompted_teacher(second, 0.1, 2.1)
        box(second, 2.75, 3.1, 1.1, 0.8, "student $q$", STUDENT)
        box(second, 2.75, 1.1, 1.1, 0.8, "teacher $p$\n(no prompt)", TEACHER)
        arrow(second, (1.95, 2.65), (2.7, 3.45), "KL($p_P$ || $q$)", offset=(-0.55, 0.22))
        arrow(second, (1.95, 2.35), (2.7, 1.55), "(1 - t/T) KL($p_P$ || $p$)", offset=(-0.35, -0.62))
        arrow(second, (1.0, 2.0), (0.32, 2.0), "gradient", PROMPT, offset=(0, -0.2), dashed=True)

        title(third, "3  Student distillation", "with the updated P; gradient to the student only")
        box(third, 0.15, 2.1, 1.15, 0.8, "student $q$", STUDENT)
        prompted_teacher(third, 2.15, 2.1)
        arrow(third, (2.1, 2.5), (1.35, 2.5), "KL($q$ || $p_P$)", offset=(0, 0.65))
        arrow(third, (1.2, 2.0), (0.3, 2.0), "gradient", GRADIENT, offset=(0, -0.2), dashed=True)
        figure.savefig(Path(__file__).with_name("method.png"))


if __name__ == "__main__":
    main()
