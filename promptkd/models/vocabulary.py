"""The token ids that student and teacher share. Their distributions are renormalized and compared over these.

Models of one tokenizer often pad their vocabularies to different sizes, and a fine-tuned model may have additional
tokens. No divergence is defined for a token that one of the models lacks. Therefore both distributions are conditioned
on the shared ids: the softmax runs over them, and other ids have neither an effect nor a gradient. Cross-entropy on the
data's tokens still uses the student's complete vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from promptkd.errors import UserError


@dataclass(frozen=True)
class SharedVocabulary:
    """Token ids that student and teacher share.

    Attributes:
        rows: Upper bound of the shared ids. Both models have logits for all ids below it.
        excluded: Ids below `rows` that only one of the two tokenizers has.
        sizes: Numbers of logits of student and teacher, for messages.
        inputs: Number of the teacher's input embeddings.
    """

    rows: int
    excluded: tuple[int, ...]
    sizes: tuple[int, int]
    inputs: int
    _indices: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return self.rows - len(self.excluded)

    def __contains__(self, token: int) -> bool:
        return token < self.rows and token not in self.excluded

    def restrict(self, logits: Tensor) -> Tensor:
        """Restrict logits so that their softmax is the one over shared ids.

        Excluded ids get minus infinity: the losses compute the limit where a probability is exactly 0.

        Args:
            logits: Logits of one of the models, `(..., vocab)`.

        Returns:
            Logits, `(..., rows)`.
        """
        logits = logits[..., : self.rows]
        if not self.excluded:
            return logits
        if logits.device not in self._indices:  # Cached: each copy from the host waits for the device.
            self._indices[logits.device] = torch.tensor(self.excluded, device=logits.device)
        return logits.index_fill(-1, self._indices[logits.device], -torch.inf)

    def notice(self, ends: Sequence[int]) -> str:
        """Describe the comparison in one line. `ends` are the ids that end a response."""
        text = (
            f"the student predicts {self.sizes[0]} tokens, the teacher {self.sizes[1]}: they are compared over the "
            f"{len(self)} that both have, renormalized"
        )
        if not any(token in self for token in ends):
            text += "; no token that ends an answer is among them, so sampled answers end at --max-length"
        return text

    def check_inputs(self, rows: Iterable[tuple[str, Iterable[int]]]) -> None:
        """Raise UserError if one of the sequences, pairs of name and token ids, has a token unknown to the teacher."""
        for name, tokens in rows:
            largest = max(map(int, tokens), default=0)
            if largest >= self.inputs:
                raise UserError(
                    f"{name} holds token {largest}, and the teacher has embeddings for {self.inputs} tokens: take such "
                    "rows out of the data, or resize the teacher (resize_token_embeddings)"
                )


def shared_vocabulary(
    sizes: tuple[int, int], inputs: int, student: Mapping[str, int], teacher: Mapping[str, int]
) -> SharedVocabulary | None:
    """Find the token ids that have the same meaning in both models.

    Args:
        sizes: Numbers of logits of student and teacher.
        inputs: Number of the teacher's input embeddings.
        student: The student's vocabulary, text -> id.
        teacher: The teacher's vocabulary.

    Returns:
        The shared ids, or None if the models share all.

    Raises:
        UserError: If an id stands for two different tokens, or no token is shared.
    """
    rows = min(sizes)
    used = [{i for i in tokens.values() if i < rows} for tokens in (student, teacher)]
    alike = {i for text, i in student.items() if i < rows and teacher.get(text) == i}
    conflicts = sorted(used[0] & used[1] - alike)
    if conflicts:
        raise UserError(_conflict(conflicts, student, teacher, len(alike)))
    if not alike:
        raise UserError("the tokenizers share no token: distill between models of one tokenizer")
    excluded = tuple(sorted(used[0] ^ used[1]))
    if sizes[0] == sizes[1] and not excluded and inputs >= sizes[0]:
        return None
    return SharedVocabulary(rows, excluded, sizes, inputs)


def _conflict(ids: list[int], student: Mapping[str, int], teacher: Mapping[str, int], alike: int) -> str:
    """Describe ids with two meanings, with the first one as an example."""
    texts = [next(text for text, i in tokens.items() if i == ids[0]) for tokens in (student, teacher)]
    other = teacher.get(texts[0])
    where = f"lacks {texts[0]!r}" if other is None else f"has {texts[0]!r} as {other}"
    return (
        f"the tokenizers differ: {len(ids)} ids have two meanings, {alike} one; {ids[0]} is {texts[0]!r} to the "
        f"student and {texts[1]!r} to the teacher, which {where}: distill between models of one tokenizer"
    )
