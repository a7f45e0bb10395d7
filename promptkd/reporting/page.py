"""One HTML page that asks nothing of the network: style, pictures and texts are all inside."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from promptkd.utils.tables import Table

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
class Answer:
    """One row of a test set. texts: what the reference and the models say, by name."""

    set: str
    asked: str
    texts: dict[str, str]


@dataclass
class Section:
    title: str
    parts: list[str | Table | Answer] = field(default_factory=list)  # a str is a paragraph
    pictures: dict[str, str] = field(default_factory=dict)  # what each shows -> SVG element


def page(title: str, sections: list[Section]) -> str:
    """The whole page; all texts are escaped, whoever wrote them."""
    body = "\n".join(_section(section) for section in sections if section.parts or section.pictures)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    heading = [f"<h2>{html.escape(section.title)}</h2>"] if section.title else []
    figures = [
        f'<figure role="img" aria-label="{html.escape(shown)}">{svg}</figure>'
        for shown, svg in section.pictures.items()
    ]
    curves = [f'<div class="curves">\n{"".join(figures)}</div>'] if figures else []
    return "\n".join(["<section>", *heading, *curves, *map(_shutdown, section.parts), "</section>"])


def _shutdown(part: str | Table | Answer) -> str:
    if isinstance(part, Table):
        return part.html()
    if isinstance(part, Answer):
        said = "".join(f"<dt>{html.escape(who)}</dt><dd>{html.escape(text)}</dd>" for who, text in part.texts.items())
        head = f"{html.escape(part.set)}: {html.escape(part.asked)}"
        return f"<details><summary>{head}</summary><dl>{said}</dl></details>"
    return f'<p class="note">{html.escape(part)}</p>'
