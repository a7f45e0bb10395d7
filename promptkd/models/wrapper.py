"""The view of a causal language model that distillation needs: hidden states, then an output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from promptkd.data.batching import MicroBatch
from promptkd.models.soft_prompt import SoftPrompt
from promptkd.models.tensor_parallel import TensorParallelGroup
from promptkd.models.vocabulary import SharedVocabulary


class LMHead(NamedTuple):
    """What turns hidden states into logits: weight [vocabulary, width], bias [vocabulary] or None.

    shared: the ids that a divergence compares; None for all of them.
    """

    weight: Tensor
    bias: Tensor | None
    shared: SharedVocabulary | None = None

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits [..., vocabulary] of this head, those of the shared ids."""
        return logits if self.shared is None else self.shared.restrict(logits)


class LanguageModel(nn.Module):
    """A causal LM, with a soft prompt in front of its input if it has one.

    `forward` hands the hidden states that predict response tokens, and the head, to a loss; so logits exist
    for those positions alone, and an engine sees one module whose output is the loss.
    """

    def __init__(
        self, model: PreTrainedModel, prompt: SoftPrompt | None = None, shared: SharedVocabulary | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.prompt = prompt
        self.shared = shared

    @property
    def group(self) -> TensorParallelGroup | None:
        """The ranks that hold the model together, None for whole models."""
        return getattr(self.model, "tensor_parallel_group", None)

    def lm_head(self) -> LMHead:
        linear = self.model.get_output_embeddings()
        return LMHead(linear.weight, linear.bias, self.shared)

    def lm_head_parameters(self) -> list[nn.Parameter]:
        return list(self.model.get_output_embeddings().parameters())

    def hidden_states(self, batch: MicroBatch, prompted: bool = True) -> Tensor:
        """Hidden states that predict the response tokens of `batch`: [response tokens, width].

        Rows are padded on the right and attention is causal, so no real token sees padding and no mask is
        needed; positions are explicit all the same. With the prompt they count from its first embedding.
        """
        ids, skip = batch.ids, 0
        inputs: dict[str, Tensor] = {"input_ids": ids}
        if prompted and self.prompt is not None:
            skip = len(self.prompt)
            tokens = self.model.get_input_embeddings()(ids)
            inputs = {"inputs_embeds": torch.cat([self.prompt(len(ids)).to(tokens.dtype), tokens], dim=1)}
        positions = torch.arange(ids.size(1) + skip, device=ids.device).expand(len(ids), -1)
        hidden = self.model.base_model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        return hidden[:, skip:].flatten(0, 1)[batch.where]

    def forward(self, batch: MicroBatch, loss: Callable[[Tensor, LMHead], Any], prompted: bool = True) -> Any:
        return loss(self.hidden_states(batch, prompted), self.lm_head())


def without_dropout(model: nn.Module) -> None:
    """Set all dropout to 0, so that a model in train mode (gradient checkpointing needs it) has none.

    transformers' models keep the rates of functional dropout as plain numbers beside their layers.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            is_rate = "dropout" in name or name == "layerdrop" or (name == "p" and isinstance(module, nn.Dropout))
            if is_rate and isinstance(value, float):
                setattr(module, name, 0.0)
