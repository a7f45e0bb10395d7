"""What a model thinks before it answers: the markers around it, and an answer without it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from promptkd.data.special_tokens import Tokenizer

Pair = tuple[str, str]  # the marker that opens a thought and the one that closes it

ALWAYS: list[Pair] = [("<think>", "</think>")]
CHANNELS: Pair = ("<|channel|>analysis", "<|channel|>final<|message|>")  # of gpt-oss
# <think>, </thinking>, [THINK], <seed:think>, <|START_THINKING|>, <|end_of_thought|>, and the like
MARKER = re.compile(r"[<\[◁]\|?(/?)(?:(begin|start|end)_?(?:of_?)?)?([\w:]*(?:think|thought|reason)\w*)\|?[>\]▷]", re.I)
SWITCHES = ("enable_thinking", "thinking")  # template arguments that ask for thoughts
_WINDOW = 32  # tokens at the end of a prompt in which a thought may have been opened


def template_text(tokenizer: Tokenizer) -> str:
    """Return the source of a tokenizer's chat templates, "" for none."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else "\n".join(template.values())


def thought_markers(tokenizer: Tokenizer) -> list[Pair]:
    """Return `<think>` and the markers that a tokenizer's chat template or its added tokens declare."""
    declared = " ".join([template_text(tokenizer), *map(str, getattr(tokenizer, "added_tokens_encoder", {}))])
    openers: dict[tuple[str, str], str] = {}
    closers: dict[tuple[str, str], str] = {}
    for match in MARKER.finditer(declared):
        slash, word, name = match.groups()
        closes = bool(slash) or (word or "").lower() == "end"
        (closers if closes else openers)[match[0][0], name.lower()] = match[0]
    pairs = [(openers[name], closers[name]) for name in openers if name in closers]
    return [*dict.fromkeys([*ALWAYS, *pairs, *([CHANNELS] if "<|channel|>" in declared else [])])]


def has_marker(text: str, pairs: list[Pair]) -> bool:
    """Return whether a text opens or closes a thought."""
    return any(marker in text for pair in pairs for marker in pair)


def without_thoughts(text: str, pairs: list[Pair], opened: bool = False) -> tuple[str, bool]:
    """Remove the thoughts from an answer's text.

    Args:
        text: What a model generated, markers included.
        pairs: The markers, see `thought_markers`.
        opened: The prompt has opened a thought.

    Returns:
        The text outside of thoughts, and whether there was a thought that is not blank. A thought without end reaches
        to the end of the text.
    """
    kept, thoughts = [], []
    first = _first(text, [opener for opener, _ in pairs])
    end = _first(text, [closer for _, closer in pairs])
    if end and (not first or end[0] < first[0]):  # it was opened in the prompt
        thoughts.append(text[: end[0]])
        text = text[end[0] + len(end[1]) :]
    elif opened:
        return "", bool(text.strip())
    while next_marker := _first(text, [opener for opener, _ in pairs]):
        place, opener = next_marker
        kept.append(text[:place])
        thought, _, text = text[place + len(opener) :].partition(dict(pairs)[opener])
        thoughts.append(thought)
    return "".join([*kept, text]), any(thought.strip() for thought in thoughts)


def answer_text(tokenizer: Tokenizer, ids: list[int], prompt: Sequence[int] | NDArray[Any] = ()) -> tuple[str, bool]:
    """Return the text of generated tokens that counts as the answer, and whether the model thought before it.

    Args:
        tokenizer: Its chat template and added tokens declare the markers of thoughts.
        ids: The generated tokens, without the one that ends them.
        prompt: The tokens of the prompt, which may have opened a thought.
    """
    plain: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    end = tokenizer.decode(list(prompt)[-_WINDOW:]) if len(prompt) else ""
    marked = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not any(MARKER.search(text) or "<|channel|>" in text for text in (marked, end)):
        return plain, False
    pairs = thought_markers(tokenizer)
    opened = any(end.rfind(opener) > end.rfind(closer) for opener, closer in pairs)
    if not has_marker(marked, pairs) and not opened:
        return plain, False
    kept = _without_special_tokens(tokenizer, ids, pairs)
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    answer, thought = without_thoughts(text, pairs, opened)
    return answer.strip(), thought


def _without_special_tokens(tokenizer: Tokenizer, ids: list[int], pairs: list[Pair]) -> list[int]:
    """Return the tokens without the special ones, except for those that mark thoughts."""
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}
    marks = "".join(marker for pair in pairs for marker in pair)
    return [token for token in ids if token not in special or str(added.get(token, "\0")) in marks]


def _first(text: str, markers: list[str]) -> tuple[int, str] | None:
    """Return the place of the first marker in a text, and the marker."""
    places = [(text.find(marker), marker) for marker in markers if marker in text]
    return min(places, default=None)
