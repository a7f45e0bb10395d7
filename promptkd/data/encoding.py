"""The one way from texts to token ids, for training, the dev set, evaluation, rollouts and generation.

The rule for a prompt ("own"): its text's tokens, and in front of them once the special tokens that the tokenizer puts
before a text (begin-of-text). They are left out where the text begins with them already, and where the tokenizer's chat
template made the prompt, because a template writes all special tokens itself. What a tokenizer puts behind a text is
never part of a prompt. "none" adds nothing in front. "published" is the published code: nothing is added in training,
everything in evaluation, and the response begins where the separately tokenized prompt ends.

Text stays text: a special token that an instruction, an input or a response spells is tokenized as ordinary text.
Special tokens of chat templates and of ready prompts are special.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from promptkd.data.special_tokens import SpecialTokens, added_around
from promptkd.data.templates import ChatTemplate, Template, prompt_and_references, response_stop_ids
from promptkd.errors import UserError

# Texts behind which a text is tokenized that continues another one.
_ANCHORS = ("\n", "a", "0", ".", " ", "the", ")")


class Encoded(NamedTuple):
    """An example's token ids, int64, the response with the token that ends it.

    Attributes:
        spelled: A text of the row spells a special token, which stays text.
        altered: No tokens of the response give its text exactly behind this prompt.
    """

    prompt: np.ndarray
    response: np.ndarray
    spelled: bool = False
    altered: bool = False

    def within(self, max_length: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return prompt and response, the response cut so that both have at most `max_length` tokens."""
        room = None if max_length is None else max(max_length - len(self.prompt), 0)
        return self.prompt, self.response[:room]


class TextEncoder:
    """Makes token ids of prompts and responses.

    Args:
        tokenizer: A Hugging Face tokenizer.
        rule: "own", "none" or "published"; see the module's text.
    """

    def __init__(self, tokenizer, rule: str = "own") -> None:
        self.tokenizer, self.rule = tokenizer, rule
        self.specials = SpecialTokens(tokenizer)
        self.leading, _ = added_around(tokenizer)
        self.chat = chat_template(tokenizer)

    def read(self, row: dict[str, Any], where: str, render: Template) -> tuple[str, list[str]]:
        """Make the prompt of a row.

        Args:
            row: A row of jsonl. A field that is null counts as absent.
            where: The file and line, for errors.
            render: The template.

        Returns:
            The marked prompt (see `SpecialTokens`) and the gold texts.
        """
        row = {key: value for key, value in row.items() if value is not None}
        prompt, references = prompt_and_references(row, where, render)
        if self.rule == "published" or not self.specials.count(prompt):
            return prompt, references
        return self._marked(row, prompt, where, render), references

    def text(self, marked: str) -> str:
        """Return a marked prompt as a text."""
        return self.specials.unmark(marked)

    def is_chat(self, text: str) -> bool:
        """Return whether the tokenizer's chat template made a prompt."""
        return self.chat is not None and self.chat.made(text)

    def prompts(self, marked: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts; an empty list where the text has no token.

        With the rule "published", all special tokens are added as in the published evaluation.
        """
        bare = [ids for ids, _ in self._ids_of_pairs([(prompt, "") for prompt in marked])]
        if self.rule != "published":
            return [[*self._in_front(self.text(prompt), ids), *ids] for prompt, ids in zip(marked, bare)]
        full = self.tokenizer(list(marked), add_special_tokens=True, verbose=False)["input_ids"]
        return [few if self.is_chat(text) or not few else every for text, few, every in zip(marked, bare, full)]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Encode (marked prompt, response) pairs.

        The prompt's ids are those of `prompts`. The response's ids continue them: both together decode to both
        texts. Where the tokens of the joined text begin with the prompt's tokens, they are these tokens.

        Raises:
            UserError: A prompt has no token.
        """
        texts = [self.text(prompt) for prompt, _ in pairs]
        ends = response_stop_ids(self.tokenizer, texts)
        encoded = []
        for (prompt, response), text, (ids, joined), end in zip(pairs, texts, self._ids_of_pairs(pairs), ends):
            if not ids:
                raise UserError(f"the prompt {text[:40]!r} has no token in this tokenizer: give it a text")
            rest, altered = self._continuation(ids, joined, text, response)
            front = [] if self.rule == "published" else self._in_front(text, ids)
            spelled = self.rule != "published" and (self.specials.has_marks(prompt) or self.specials.count(response))
            parts = (np.array(each, dtype=np.int64) for each in ([*front, *ids], [*rest, end]))
            encoded.append(Encoded(*parts, bool(spelled), altered))
        return encoded

    def texts(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Return the ids of plain texts, without special tokens, and how many of them spell one."""
        spelling = [self.specials.count(text) > 0 for text in texts]
        plain = iter(self._ids([text for text, spells in zip(texts, spelling) if not spells]))
        ids = [self._spelled_ids(text) if spells else next(plain) for text, spells in zip(texts, spelling)]
        return ids, sum(spelling)

    def _marked(self, row: dict[str, Any], prompt: str, where: str, render: Template) -> str:
        """The prompt of a row with a mark for each special token that its contents spell."""
        ready = row.get("prompt")
        if ready != prompt:  # a template made the prompt of contents
            return render(self.specials.mark(row), where)
        for key in ("instruction", "input"):  # a template made it earlier, and what it is made of stands beside
            content = row.get(key)
            if isinstance(content, str) and self.specials.count(content):
                prompt = prompt.replace(content.strip(), self.specials.mark(content.strip()))
        return prompt

    def _in_front(self, text: str, ids: list[int]) -> list[int]:
        """The special tokens to put in front of a prompt of these ids."""
        if self.rule != "own" or not self.leading or not ids or self.is_chat(text):
            return []
        there = next(n for n in range(len(self.leading), -1, -1) if ids[:n] == self.leading[len(self.leading) - n :])
        return self.leading[: len(self.leading) - there]

    def _ids_of_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """The ids of each prompt and of each prompt with its response, without special tokens in front."""
        ordinary = [self.rule == "published" or self._is_ordinary(*pair) for pair in pairs]
        at_once = [pair for pair, plain in zip(pairs, ordinary) if plain]
        prompts = iter(self._ids([prompt for prompt, _ in at_once]))
        joined = iter(self._ids([prompt + response for prompt, response in at_once]))
        return [
            (next(prompts), next(joined)) if plain else self._ids_of_spelling(*pair)
            for pair, plain in zip(pairs, ordinary)
        ]

    def _is_ordinary(self, prompt: str, response: str) -> bool:
        """Whether a tokenizer sees special tokens only where a template or a ready prompt has them."""
        if self.specials.has_marks(prompt):
            return False
        return self.specials.count(prompt + response) == self.specials.count(prompt)

    def _ids_of_spelling(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """The same for a row whose texts spell special tokens, which stay text."""
        parts, rest = self.specials.split(prompt)
        ids: list[int] = []
        begins = True
        for text, token in parts:
            ids += [*self._text_ids(text, begins), token]
            begins = self._begins_behind(token)
        return ids + self._text_ids(rest, begins), ids + self._text_ids(rest + response, begins)

    def _begins_behind(self, token: int) -> bool:
        """Whether the tokenizer treats a text behind a special token like one at the beginning (Metaspace may)."""
        name = self.tokenizer.convert_ids_to_tokens(token)
        return self._ids([f"{name}a"])[0] == [token, *self._ids(["a"])[0]]

    def _text_ids(self, text: str, begins: bool) -> list[int]:
        """The ids of a text without special tokens, at the beginning or behind other tokens."""
        if not text:
            return []
        return self._spelled_ids(text) if begins else next(self._continuations(text))

    def _continuations(self, text: str) -> Iterator[list[int]]:
        """Ids of a text that continues other tokens, the likeliest first."""
        for anchor in _ANCHORS:
            before, both = self._spelled_ids(anchor), self._spelled_ids(anchor + text)
            if both[: len(before)] == before:
                yield both[len(before) :]
        yield self._spelled_ids(text)
        for anchor in _ANCHORS[1:]:  # each character on its own, where every anchor merges with the first one
            before = self._spelled_ids(anchor)
            heads = [self._spelled_ids(anchor + character) for character in text]
            if all(ids[: len(before)] == before for ids in heads):
                yield [token for ids in heads for token in ids[len(before) :]]

    def _continuation(self, ids: list[int], joined: list[int], prompt: str, response: str) -> tuple[list[int], bool]:
        """The response's ids behind a prompt's, and whether the text is altered by that."""
        if joined[: len(ids)] == ids or self.rule == "published":
            return joined[len(ids) :], False
        wanted = {prompt + response, self._decode(joined)}
        closest, longest = self._spelled_ids(response), -1
        for found in self._continuations(response):
            text = self._decode([*ids, *found])
            if text in wanted:
                return found, False
            alike = max(_common(text, whole) for whole in wanted)
            if alike > longest:
                closest, longest = found, alike
        return closest, True

    def _spelled_ids(self, text: str) -> list[int]:
        """The ids of a text in which a special token's name is ordinary text."""
        ids = self._ids([text], split_special_tokens=True)[0]
        special = {token for name, token in self.specials.ids.items() if name in text}
        if special.isdisjoint(ids):
            return ids
        # The vocabulary has the name as a word, too: break it after its first character.
        first, *others = self.specials.broken(text)
        return self._spelled_ids(first) + [token for piece in others for token in next(self._continuations(piece))]

    def _ids(self, texts: list[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False, **options)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def chat_template(tokenizer) -> ChatTemplate | None:
    """Return the tokenizer's chat template, None where it has none that can be used."""
    try:
        return ChatTemplate(tokenizer)
    except UserError:
        return None


def _common(one: str, other: str) -> int:
    """The number of characters at the beginning that two texts share."""
    return next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))
