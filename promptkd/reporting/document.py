"""Render a report as one self-contained HTML page, without network access, or as Markdown."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from promptkd.utils.tables import Table

LONGEST_TEXT = 160  # characters of a prompt or an answer in a Markdown table

STYLE = """
:root { color-scheme: light dark;
  --ink: #1c2024; --paper: #ffffff; --line: #d5dae0; --faint: #5b6570; --band: #f3f5f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #14171a; --line: #363d45; --faint: #9aa5b1; --band: #1d2226; }
  .curves svg { filter: brightness(1.3); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.note { color: var(--faint); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
th { color: var(--faint); font-weight: 600; } .number { text-align: right; white-space: nowrap; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.curves figure { margin: 0; } .curves svg { width: 100%; height: auto; }
details { border-bottom: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; }
dl { margin: .5rem 0 0; } dt { color: var(--faint); font-size: .85rem; }
dd { margin: 0 0 .6rem; padding: .3rem .6rem; background: var(--band); white-space: pre-wrap; }
"""


@dataclass(frozen=True)
class Answers:
    """Examples of a test set with what the reference and the models answer."""

    set: str
    examples: list[tuple[str, dict[str, str]]]  # at least one (prompt, name -> answer), all with the same names

    def html(self) -> str:
        """Format the examples as HTML elements that open on a click."""
        return "\n".join(
            f"<details><summary>{html.escape(self.set)}: {html.escape(prompt)}</summary><dl>"
            + "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in texts.items())
            + "</dl></details>"
            for prompt, texts in self.examples
        )

    def markdown(self) -> str:
        """Format the examples as a Markdown table of shortened texts."""
        names = self.examples[0][1]
        table = Table([self.set, *names], texts=len(names) + 1)
        for prompt, texts in self.examples:
            table.add(*map(_shorten, (prompt, *texts.values())))
        return table.markdown()


@dataclass
class Section:
    """A part of a report. Its paragraphs are strings. A section without content is left out."""

    title: str
    parts: list[str | Table | Answers] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)  # title -> SVG element

    def html(self) -> str:
        """Format the section as HTML. All texts are escaped."""
        heading = [f"<h2>{html.escape(self.title)}</h2>"] if self.title else []
        figures = "".join(
            f'<figure role="img" aria-label="{html.escape(title)}">{svg}</figure>'
            for title, svg in self.pictures.items()
        )
        curves = [f'<div class="curves">\n{figures}</div>'] if figures else []
        parts = [f'<p class="note">{html.escape(x)}</p>' if isinstance(x, str) else x.html() for x in self.parts]
        return "\n".join(["<section>", *heading, *curves, *parts, "</section>"])

    def markdown(self) -> str:
        """Format the section as Markdown, without its pictures."""
        parts = [part if isinstance(part, str) else part.markdown() for part in self.parts]
        return "\n\n".join([f"## {self.title}", *parts] if self.title else parts)


def html_page(title: str, sections: list[Section]) -> str:
    """Format a complete page. All texts are escaped."""
    body = "\n".join(section.html() for section in sections if section.parts or section.pictures)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def markdown_page(title: str, sections: list[Section], picture: str) -> str:
    """Format the same as Markdown, with one linked picture for a section that has pictures."""
    filled = [section for section in sections if section.parts or section.pictures]
    parts = [picture if section.pictures else section.markdown() for section in filled]
    return "\n\n".join([f"# {title}", *parts]) + "\n"


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 3] + "..."
