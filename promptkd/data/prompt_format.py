"""How prompts were made: recorded with trained models, recognized in token files, and compared.

Training and evaluation have to make prompts in the same way. A token file has to fit the tokenizer, and the text beside
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from promptkd.data.encoding import Encoded, TextEncoder
from promptkd.data.rows import read_row, reference_texts, render_prompt
from promptkd.data.special_tokens import Tokenizer
from promptkd.data.token_file import LARGEST_UINT16_VOCABULARY, TokenFile, split_row
from promptkd.utils.strict_json import read_object

RECORD = "promptkd.json"  # in a saved model's folder
# The number of rows that are compared where the text is no newer than the tokens, and where it is newer.
_SAMPLE, _MOST = 512, 20_000


@dataclass(frozen=True)
class PromptFormat:
    """How prompts were made.

    Attributes:
        template: "published" or "chat". The template of ready prompts is the one that they look like.
        special_tokens: The rule for special tokens in front, see promptkd.data.encoding.
    """

    template: str = "published"
    special_tokens: str = "own"

    def as_dict(self) -> dict[str, str]:
        """Return the content of `RECORD`."""
        return dataclasses.asdict(self)


def read_format(model_path: str | None) -> PromptFormat | None:
    """Return how a model's training prompts were made; None for a model that this project did not save."""
    path = Path(model_path or "") / RECORD
    if not model_path or not path.is_file():
        return None
    record = read_object(path, "name a model's folder as it was saved")
    names = [each.name for each in dataclasses.fields(PromptFormat)]
    return PromptFormat(**{name: record[name] for name in names if isinstance(record.get(name), str)})


def choose_rule(special_tokens: str, *model_paths: str | None) -> str:
    """Return the rule for special tokens: the option's, or for "auto" the first model's record, or "own"."""
    if special_tokens != "auto":
        return special_tokens
    records = (read_format(path) for path in model_paths)
    return next((record.special_tokens for record in records if record is not None), "own")


def mismatch(current: PromptFormat, model_path: str | None, option: str) -> str:
    """Return a warning where a model was trained on prompts that were made in another way, else ""."""
    trained = read_format(model_path)
    if trained is None or trained == current:
        return ""
    now = current.as_dict()
    differences = ", ".join(
        f"--{name.replace('_', '-')} {value} and not {now[name]}"
        for name, value in trained.as_dict().items()
        if value != now[name]
    )
    return (
        f"{option} {model_path} was trained on prompts of {differences}: answers suffer where prompts differ ({RECORD})"
    )


def template_of_prompts(template: str, encoder: TextEncoder, marked: Sequence[str]) -> str:
    """Return the template that made prompts: the option's, or the one that ready prompts look like."""
    ready = bool(marked) and all(encoder.is_chat(encoder.specials.unmark(prompt)) for prompt in marked[:64])
    return "chat" if ready else template


def format_of_file(file: TokenFile, encoder: TextEncoder, prompts_only: bool) -> PromptFormat:
    """Recognize how a token file's prompts were made.

    Published token files have no special token in front, whatever the tokenizer adds in evaluation: their rule is
    "none".

    Args:
        file: The token file.
        encoder: The encoder with the tokenizer.
        prompts_only: Rows without a marker are prompts. Otherwise they are plain text.
    """
    if not encoder.leading and encoder.chat is None:
        return PromptFormat()
    rows = [file[row] for row in _sample(len(file), 64)]
    prompts = [split_row(row, file.marker)[0] for row in rows if file.marker in row]
    prompts += [row for row in rows if prompts_only and file.marker not in row]
    others = [ids.tolist() for ids in prompts if not encoder.is_chat(encoder.tokenizer.decode(ids))]
    size = len(encoder.leading)
    rule = "none" if others and not any(ids[:size] == encoder.leading for ids in others) else "own"
    return PromptFormat("chat" if prompts and not others else "published", rule)


def rule_of_folder(folder: Path, tokenizer: Tokenizer, special_tokens: str) -> str | None:
    """Return the rule for the prompts of a folder: the option's, or for "auto" its token files', None without any."""
    if special_tokens != "auto":
        return special_tokens
    prefix = folder / "train_0"
    if not all(prefix.with_name(f"train_0{end}").is_file() for end in (".bin", ".idx")):
        return None
    return format_of_file(TokenFile(prefix), TextEncoder(tokenizer), prompts_only=True).special_tokens


def doubt_about_text(file: TokenFile, path: Path, rows: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> str:
    """Return a line about the first row whose tokens differ from the text beside it, "" where there is none.

    All rows (of a large file many) are compared where the text is newer than the tokens, else a sample.
    """
    newer = path.stat().st_mtime > file.bin_path.stat().st_mtime + 1
    places = _sample(len(file), _MOST if newer else _SAMPLE)
    left = [place for place in places if "prompt" in rows[place] or "instruction" in rows[place]]
    for rule in ("published", "own", "none"):
        encoder = TextEncoder(tokenizer, rule)
        texts = [encoder.read(rows[place], f"{path}, line {place + 1}", render_prompt) for place in left]
        encoded = encoder.pairs([(text.prompt, text.references[0]) for text in texts]) if texts else []
        left = [place for place, each in zip(left, encoded) if not _is_row(file[place], file.marker, each)]
    for place in left:
        if not _decodes_to(file, place, rows[place], f"{path}, line {place + 1}", tokenizer):
            return (
                f"{path}, line {place + 1} does not say what row {place} of {file.bin_path.name} holds: the text was "
                "edited, or the tokens are another tokenizer's: process the data again, or remove the token files to "
                "read the text"
            )
    return ""


def doubt_about_tokens(file: TokenFile, tokenizer: Tokenizer, vocabulary: int) -> str:
    """Return a line where another tokenizer seems to have made a token file, "" where nothing indicates that."""
    remedy = "process the data again with this model's tokenizer if it is another's"
    if vocabulary > LARGEST_UINT16_VOCABULARY and file.dtype.itemsize == 2:
        return f"{file.bin_path}: it was made for a vocabulary under {LARGEST_UINT16_VOCABULARY:,} tokens: {remedy}"
    rows = [file[row] for row in _sample(len(file), 64)]
    responses = [row for row in rows if file.marker in row]
    known = {*getattr(tokenizer, "added_tokens_decoder", {}), tokenizer.eos_token_id}
    ended = (row[-1] in known for row in responses) if responses else (bool(known & set(row.tolist())) for row in rows)
    if any(ended):
        return ""
    problem = "response ends with" if responses else "row holds"
    return f"{file.bin_path}: no {problem} a token that ends a text in this tokenizer: {remedy}"


def _sample(rows: int, most: int) -> list[int]:
    """Return at most `most` evenly spread rows, among them the first and the last."""
    return sorted({*np.linspace(0, rows - 1, min(rows, most)).astype(int).tolist()})


def _decodes_to(file: TokenFile, place: int, raw: dict[str, Any], where: str, tokenizer: Tokenizer) -> bool:
    """Return whether tokens decode to a row's text: another version of a tokenizer may cut it into other tokens."""
    ids = file[place]
    text = render_prompt(read_row(raw, where), where) + (reference_texts(raw, where)[0] if file.marker in ids else "")
    decoded = tokenizer.decode(ids[ids != file.marker], skip_special_tokens=True).split()
    again = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).split()
    return bool(decoded) and decoded in (text.split(), again)


def _is_row(tokens: np.ndarray, marker: int, encoded: Encoded) -> bool:
    """Return whether a row of a token file has these ids. Its response may be cut, and may end with another token."""
    if marker not in tokens:
        return np.array_equal(tokens, encoded.prompt)
    prompt, response = split_row(tokens, marker)
    complete = len(response) == len(encoded.response)
    compared = len(response) - complete
    same = np.array_equal(response[:compared], encoded.response[:compared])
    return same and np.array_equal(prompt, encoded.prompt)
