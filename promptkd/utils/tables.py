"""Write tables as plain text, Markdown and HTML."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import Any

SPECIAL = r"([\\`*|<\[]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))"  # has a meaning in Markdown


@dataclass(frozen=True)
class Cell:
    """The text of a cell and its style."""

    text: str
    style: str = ""  # HTML element: "strong", "em", or "" for plain text

    def markdown(self) -> str:
        """Format the cell as Markdown, with special characters escaped."""
        text = re.sub(SPECIAL, r"\\\1", " ".join(self.text.split()))
        mark = {"strong": "**", "em": "*", "": ""}[self.style]
        return f"{mark}{text}{mark}"

    def html(self) -> str:
        """Format the cell's content as HTML, with special characters escaped."""
        text = html.escape(self.text)
        return f"<{self.style}>{text}</{self.style}>" if self.style else text


@dataclass
class Table:
    """A table. The first `texts` columns are left-aligned text, the others right-aligned numbers."""

    heads: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    texts: int = 1

    def add(self, *cells: str | Cell) -> None:
        """Append a row of cells or plain texts. Missing cells at the end are empty."""
        padded = (*cells, *[""] * (len(self.heads) - len(cells)))
        self.rows.append([cell if isinstance(cell, Cell) else Cell(cell) for cell in padded])

    def texts_of_rows(self) -> list[list[str]]:
        """Return the cells' texts."""
        return [[cell.text for cell in row] for row in self.rows]

    def text(self) -> str:
        """Format the table as plain text in columns, for the terminal."""
        lines = [self.heads, *self.texts_of_rows()]
        widths = [max(map(len, column)) for column in zip(*lines)]
        pads = [str.ljust if column < self.texts else str.rjust for column in range(len(self.heads))]
        return "\n".join(
            "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths)).rstrip() for line in lines
        )

    def markdown(self) -> str:
        """Format the table as Markdown."""
        rules = ["---" if column < self.texts else "--:" for column in range(len(self.heads))]
        lines = [[Cell(head).markdown() for head in self.heads], *([c.markdown() for c in row] for row in self.rows)]
        first, *rest = ("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines)
        return "\n".join([first, f"|{'|'.join(rules)}|", *rest])

    def html(self) -> str:
        """Format the table as HTML that scrolls if it is wide."""
        kinds = ["" if column < self.texts else ' class="number"' for column in range(len(self.heads))]
        heads = "".join(f"<th{kind}>{html.escape(head)}</th>" for head, kind in zip(self.heads, kinds))
        rows = ("".join(f"<td{kind}>{cell.html()}</td>" for cell, kind in zip(row, kinds)) for row in self.rows)
        body = "".join(f"<tr>{row}</tr>\n" for row in rows)
        return f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def evaluation_table(metrics: list[dict[str, Any]]) -> Table:
    """Build the table of a run's evaluations on the dev set from the rows of its metrics.jsonl."""
    return metrics_table([row for row in metrics if row["event"] == "eval"])


def metrics_table(rows: list[dict[str, Any]]) -> Table:
    """Build the table of the numbers in rows of a metrics.jsonl."""
    numbers = (name for row in rows for name, value in row.items() if isinstance(value, (int, float)))
    names = [name for name in dict.fromkeys(numbers) if name not in ("step", "epoch", "eval_seconds")]
    table = Table(["step", *names])
    for row in rows:
        table.add(str(row["step"]), *(f"{row[name]:.4f}" if name in row else "-" for name in names))
    return table
