"""The token ids that student and teacher share: distributions are compared over these, renormalized.

Models of one tokenizer often pad their vocabularies to different sizes, and a fine-tuned model may know a few more
tokens. A token that one of the models does not have can have no divergence, so both distributions are conditioned on
the shared ids: the softmax runs over them, and no other row has any effect, nor any gradient. A loss on the data's
tokens (cross-entropy) still uses all of the student's vocabulary.
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

    rows: shared ids are below it; each model has an output row for all of them.
    excluded: ids below `rows` that only one of the two tokenizers knows.
    sizes: output rows of student and teacher, for messages.
    inputs: rows of the teacher's input embedding.
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
        """Logits [..., vocabulary] of one of the models -> [..., rows], so that a softmax is that over shared ids.

        Excluded ids get minus infinity: the losses compute the limit where a probability is exactly 0.
        """
        logits = logits[..., : self.rows]
        if not self.excluded:
            return logits
        if logits.device not in self._indices:  # once: a copy from the host would wait for the device each time
            self._indices[logits.device] = torch.tensor(self.excluded, device=logits.device)
        return logits.index_fill(-1, self._indices[logits.device], -torch.inf)

    def notice(self, ends: Sequence[int]) -> str:
        """One line for the screen. ends: the ids that end a response."""
        text = (
            f"the student predicts {self.sizes[0]} tokens, the teacher {self.sizes[1]}: they are compared over the "
            f"{len(self)} that both have, renormalized"
        )
        if not any(token in self for token in ends):
            text += "; no token that ends an answer is among them, so sampled answers end at --max-length"
        return text

    def check_inputs(self, rows: Iterable[tuple[str, Iterable[int]]]) -> None:
        """Raise UserError for a token that the teacher has no embedding for. rows: (its name, token ids)."""
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
    """The ids that mean the same to both models; None where all do.

    Args:
        sizes: Output rows of student and teacher.
        inputs: Rows of the teacher's input embedding.
        student: The student's tokens, text -> id.
        teacher: The teacher's tokens.

    Raises:
        UserError: An id that both models have stands for two different tokens, or no token is shared.
    """
    rows = min(sizes)
    known = [{i for i in tokens.values() if i < rows} for tokens in (student, teacher)]
    alike = {i for text, i in student.items() if i < rows and teacher.get(text) == i}
    conflicts = sorted(known[0] & known[1] - alike)
    if conflicts:
        raise UserError(_conflict(conflicts, student, teacher, len(alike)))
    if not alike:
        raise UserError("the tokenizers share no token: distil between models of one tokenizer")
    excluded = tuple(sorted(known[0] ^ known[1]))
    if sizes[0] == sizes[1] and not excluded and inputs >= sizes[0]:
        return None
    return SharedVocabulary(rows, excluded, sizes, inputs)


def _conflict(ids: list[int], student: Mapping[str, int], teacher: Mapping[str, int], alike: int) -> str:
    """The error for ids with two meanings, with the first as an example."""
    texts = [next(text for text, i in tokens.items() if i == ids[0]) for tokens in (student, teacher)]
    other = teacher.get(texts[0])
    where = f"lacks {texts[0]!r}" if other is None else f"has {texts[0]!r} as {other}"
    return (
        f"the tokenizers differ: {len(ids)} ids have two meanings, {alike} one; {ids[0]} is {texts[0]!r} to the "
        f"student and {texts[1]!r} to the teacher, which {where}: distil between models of one tokenizer"
    )
