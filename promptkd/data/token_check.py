"""Whether a token file is of this tokenizer, and of the text beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from promptkd.data.encoding import Encoded, TextEncoder
from promptkd.data.templates import prompt_and_references, render_prompt
from promptkd.data.token_file import LARGEST_UINT16_VOCABULARY, TokenFile, split_row

_SAMPLE, _MOST = 512, 20_000  # rows that are compared where the text is no newer than the tokens, and where it is


def format_of_file(file: TokenFile, encoder: TextEncoder, prompts_only: bool) -> tuple[str, str]:
    """Return how a token file's prompts were made.

    Args:
        file: The token file.
        encoder: Knows the tokenizer.
        prompts_only: Rows without a marker are prompts, and not plain text.

    Returns:
        The rule (see promptkd.data.encoding) and the template. Published token files have no special token in front,
        whatever the tokenizer adds in evaluation: their rule is "none".
    """
    if not encoder.leading and encoder.chat is None:
        return "own", "published"
    rows = [file[row] for row in _sample(len(file), 64)]
    prompts = [split_row(row, file.marker)[0] for row in rows if file.marker in row]
    prompts += [row for row in rows if prompts_only and file.marker not in row]
    others = [ids.tolist() for ids in prompts if not encoder.is_chat(encoder.tokenizer.decode(ids))]
    size = len(encoder.leading)
    rule = "none" if others and not any(ids[:size] == encoder.leading for ids in others) else "own"
    return rule, "chat" if prompts and not others else "published"


def rule_of_folder(folder: Path, tokenizer, special_tokens: str) -> str | None:
    """Return the rule for the prompts of a folder: the option's, or for "auto" the token files', None without any."""
    if special_tokens != "auto":
        return special_tokens
    prefix = folder / "train_0"
    if not all(prefix.with_name(f"train_0{end}").is_file() for end in (".bin", ".idx")):
        return None
    return format_of_file(TokenFile(prefix), TextEncoder(tokenizer), prompts_only=True)[0]


def doubt_about_text(file: TokenFile, path: Path, rows: Sequence[dict[str, Any]], tokenizer) -> str:
    """Return one line about the first row whose tokens are not those of the text beside it, "" where all are.

    All rows (of a large file many) are compared where the text is newer than the tokens, else a sample.
    """
    newer = path.stat().st_mtime > file.bin_path.stat().st_mtime + 1
    places = _sample(len(file), _MOST if newer else _SAMPLE)
    left = [place for place in places if "prompt" in rows[place] or "instruction" in rows[place]]
    for rule in ("published", "own", "none"):
        encoder = TextEncoder(tokenizer, rule)
        texts = [encoder.read(rows[place], f"{path}, line {place + 1}", render_prompt) for place in left]
        made = encoder.pairs([(prompt, references[0]) for prompt, references in texts]) if texts else []
        left = [place for place, each in zip(left, made) if not _is_row(file[place], file.marker, each)]
    for place in left:
        if not _decodes_to(file, place, rows[place], f"{path}, line {place + 1}", tokenizer):
            return (
                f"{path}, line {place + 1} does not say what row {place} of {file.bin_path.name} holds: the text was "
                "edited, or the tokens are another tokenizer's: process the data again, or remove the token files to "
                "read the text"
            )
    return ""


def doubt_about_tokens(file: TokenFile, tokenizer, size: int) -> str:
    """Return one line about token files that another tokenizer seems to have made, "" where nothing speaks for that."""
    remedy = "process the data again with this model's tokenizer if it is another's"
    if size > LARGEST_UINT16_VOCABULARY and file.dtype.itemsize == 2:
        return f"{file.bin_path}: it was made for a vocabulary under {LARGEST_UINT16_VOCABULARY:,} tokens: {remedy}"
    rows = [file[row] for row in _sample(len(file), 64)]
    responses = [row for row in rows if file.marker in row]
    known = {*getattr(tokenizer, "added_tokens_decoder", {}), tokenizer.eos_token_id}
    ended = (row[-1] in known for row in responses) if responses else (bool(known & set(row.tolist())) for row in rows)
    if any(ended):
        return ""
    what = "response ends with" if responses else "row holds"
    return f"{file.bin_path}: no {what} a token that ends a text in this tokenizer: {remedy}"


def _sample(rows: int, most: int) -> list[int]:
    """At most `most` places, evenly spread, the first and the last among them."""
    return sorted({*np.linspace(0, rows - 1, min(rows, most)).astype(int).tolist()})


def _decodes_to(file: TokenFile, place: int, row: dict[str, Any], where: str, tokenizer) -> bool:
    """Whether tokens decode to the text of a row: another version of a tokenizer may cut it into other tokens."""
    prompt, references = prompt_and_references(row, where)
    ids = file[place]
    text = prompt + references[0] if file.marker in ids else prompt
    held = tokenizer.decode(ids[ids != file.marker], skip_special_tokens=True).split()
    again = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).split()
    return bool(held) and held in (text.split(), again)


def _is_row(tokens: np.ndarray, marker: int, made: Encoded) -> bool:
    """Whether a row of a token file has these ids. Its response may be cut, and may end with another token."""
    if marker not in tokens:
        return np.array_equal(tokens, made.prompt)
    prompt, said = split_row(tokens, marker)
    whole = len(said) == len(made.response)
    same = np.array_equal(said[: len(said) - whole], made.response[: len(said) - whole])
    return same and np.array_equal(prompt, made.prompt)
