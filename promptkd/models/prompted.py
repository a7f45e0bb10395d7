"""A teacher behind its soft prompt, for use outside of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd.models.loading import load_causal_lm, load_config, load_own_tokenizer
from promptkd.models.soft_prompt import SoftPrompt, load_prompt


class PromptedTeacher(nn.Module):
    """A frozen teacher that reads its soft prompt before each sequence.

    Padding on either side is allowed. PEFT drops the positions of padded sequences, which changes the results of
    models with learned positions.

    Attributes:
        model: The teacher.
        prompt: The soft prompt.
        tokenizer: The teacher's tokenizer.
    """

    def __init__(self, model: PreTrainedModel, prompt: SoftPrompt, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.prompt, self.tokenizer = model, prompt, tokenizer
        self.requires_grad_(False).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits at the tokens, `(batch, seq, vocab)`, without those at the soft prompt."""
        inputs = self._inputs(input_ids, attention_mask)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits: Tensor = self.model(**inputs, position_ids=positions).logits
        return logits[:, len(self.prompt) :]

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Return new tokens, `(batch, new tokens)`. The options are those of transformers' `generate`."""
        generate: Any = self.model.generate
        tokens: Tensor = generate(**self._inputs(input_ids, attention_mask), **options)
        return tokens

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
        tokens = self.model.get_input_embeddings()(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return {
            "inputs_embeds": torch.cat([self.prompt(len(input_ids)).to(tokens.dtype), tokens], dim=1),
            "attention_mask": torch.cat([mask.new_ones(len(mask), len(self.prompt)), mask], dim=1),
        }


def load_prompted_teacher(
    teacher: str | Path, prompt: str | Path, dtype: torch.dtype = torch.float32
) -> PromptedTeacher:
    """Load a teacher and the soft prompt that a run tuned for it.

    Args:
        teacher: The teacher's Hugging Face folder or hub name.
        prompt: The folder `prompt` of a run, in PEFT's format.
        dtype: The precision of the teacher.

    Raises:
        UserError: One of the two cannot be read, or they do not fit each other.
    """
    path = str(teacher)
    tokenizer = load_own_tokenizer(path, load_config(path, "the teacher"), "the teacher")
    model = load_causal_lm(path, dtype, "the teacher")
    embedding: Any = model.get_input_embeddings()
    return PromptedTeacher(model, SoftPrompt(load_prompt(Path(prompt), embedding.weight.size(1))), tokenizer)
