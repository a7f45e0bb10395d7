"""What to decode, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from promptkd.generation.sampling import Sampling, TeacherMixture
from promptkd.models.vocabulary import SharedVocabulary


@dataclass(frozen=True)
class GenerationRequest:
    """Prompts to respond to, and how.

    Attributes:
        prompts: Token ids of each prompt.
        max_new_tokens: Maximum number of tokens in a response.
        end_ids: Tokens that end a response (see `promptkd.models.loading.end_ids`).
        sampling: How the next token is chosen.
        rng_keys: For each prompt, the seed and further integers that its random numbers belong to. Only for sampling.
        teacher_mixture: A second model that contributes to the distribution of each token.
        prefix: Embeddings in front of every prompt, `(length, hidden)`. Excludes `teacher_mixture`.
        shared: Restricts the distributions to these token ids, renormalized.
        keep_states: Whether to return the hidden states that predict the responses.
    """

    prompts: Sequence[Sequence[int]] | Sequence[np.ndarray]
    max_new_tokens: int
    end_ids: Sequence[int]
    sampling: Sampling
    rng_keys: Sequence[tuple[int, ...]] = ()
    teacher_mixture: TeacherMixture | None = None
    prefix: Tensor | None = None
    shared: SharedVocabulary | None = None
    keep_states: bool = False

    def __post_init__(self) -> None:
        if self.teacher_mixture is not None and self.prefix is not None:
            raise ValueError("teacher_mixture and prefix exclude each other: the models' positions would differ")


@dataclass
class GenerationOutput:
    """Responses in the order of the prompts.

    Attributes:
        responses: Token ids on the CPU, int64 `(length,)`. The last one is an end token unless the limit was reached.
        hidden_states: The states that predicted the tokens, `(length, hidden)`. Empty unless they were requested.
    """

    responses: list[Tensor]
    hidden_states: list[Tensor]
