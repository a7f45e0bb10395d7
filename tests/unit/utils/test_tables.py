"""Test tables as plain text, Markdown and HTML."""

from __future__ import annotations

import pytest

from promptkd.utils.tables import Cell, Table


@pytest.fixture
def table() -> Table:
    table = Table(["model", "score"])
    table.add(Cell("a|b", "em"), Cell("12.5", "strong"))
    table.add("<long name>")
    return table


def test_table_text_aligns_columns(table):
    assert table.text() == "model        score\na|b           12.5\n<long name>"


def test_table_markdown_escapes_special_characters(table):
    assert table.markdown() == "| model | score |\n|---|--:|\n| *a\\|b* | **12.5** |\n| \\<long name> | |"


def test_table_html_escapes_special_characters(table):
    assert '<td>&lt;long name&gt;</td><td class="number"></td>' in table.html()
    assert '<td><em>a|b</em></td><td class="number"><strong>12.5</strong></td>' in table.html()
