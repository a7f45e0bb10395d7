"""A causal language model as distillation sees it: hidden states at response positions, then an output head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from promptkd.data.batching import MicroBatch
from promptkd.models.soft_prompt import SoftPrompt
from promptkd.models.tensor_parallel import TensorParallelGroup, group_of
from promptkd.models.vocabulary import SharedVocabulary


class LMHead(NamedTuple):
    """The linear layer from hidden states to logits.

    Attributes:
        weight: The weight, `(vocab, hidden)`.
        bias: The bias, `(vocab,)`, or None.
        shared: The token ids that a divergence compares, or None for all.
        padding: Number of rows at the end of weight and bias that belong to no token.
    """

    weight: Tensor
    bias: Tensor | None
    shared: SharedVocabulary | None = None
    padding: int = 0

    def aligned(self) -> LMHead:
        """Return a head that a GPU multiplies fast: in half precision, with a multiple of 8 rows.

        For other numbers, such as GPT-2's 50,257, cuBLAS has only kernels that take seven times as long on an H200.
        The copy costs less than a tenth of one product with 1,024 hidden states.
        """
        padding = -len(self.weight) % 8
        is_slow = padding and self.weight.is_cuda and self.weight.itemsize <= 2
        return self.padded(padding) if is_slow else self

    def padded(self, padding: int) -> LMHead:
        """Append rows of zeros, which `logits` leaves out."""
        bias = None if self.bias is None else F.pad(self.bias, (0, padding))
        return LMHead(F.pad(self.weight, (0, 0, 0, padding)), bias, self.shared, padding)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of all token ids from hidden states `(..., hidden)`."""
        logits = self.product(hidden)
        return logits[..., : logits.size(-1) - self.padding] if self.padding else logits

    def product(self, hidden: Tensor) -> Tensor:
        """Compute the logits of all rows, padding included.

        On a CPU, each token's logits begin at a cache line. With 50,257 numbers one after the other, the product takes
        a third longer.
        """
        is_slow = hidden.device.type == "cpu" and hidden.dtype == torch.float32 and hidden.dim() == 2
        if not is_slow or torch.is_grad_enabled():
            return F.linear(hidden, self.weight, self.bias)
        size = len(self.weight)
        logits = hidden.new_empty(len(hidden), -(-size // 16) * 16)[:, :size]
        torch.mm(hidden, self.weight.t(), out=logits)
        return logits if self.bias is None else logits.add_(self.bias)

    def restrict(self, logits: Tensor) -> Tensor:
        """Restrict logits `(..., vocab)` of this head to the shared token ids."""
        return logits if self.shared is None else self.shared.restrict(logits)


class LanguageModel(nn.Module):
    """A causal language model, optionally with a soft prompt in front of its input.

    `forward` passes the hidden states that predict response tokens, and the head, to a loss. Logits therefore exist
    only for those positions, and an engine sees one module whose output is the loss.
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
        """The ranks that hold the model together, or None if it is not sharded."""
        return group_of(self.model)

    @property
    def prefix(self) -> Tensor | None:
        """The embeddings of the soft prompt, `(prompt_len, hidden)`, which decoding puts in front of prompts."""
        return None if self.prompt is None else self.prompt.embeddings.detach()

    def lm_head(self) -> LMHead:
        """Return the output head. Under ZeRO-3 its parameters have to be gathered first."""
        linear = cast(nn.Linear, self.model.get_output_embeddings())
        return LMHead(linear.weight, linear.bias, self.shared)

    def lm_head_parameters(self) -> list[nn.Parameter]:
        """List the parameters of the output head."""
        return list(self.model.get_output_embeddings().parameters())

    def hidden_states(self, batch: MicroBatch, prompted: bool = True) -> Tensor:
        """Compute the hidden states that predict the response tokens of a batch.

        Sequences are padded on the right and attention is causal, so no real token sees padding and no mask is needed.
        Positions are given explicitly. They start at the first embedding of the soft prompt if there is one.

        Args:
            batch: The sequences.
            prompted: Whether to use the soft prompt.

        Returns:
            Hidden states, `(response tokens, hidden)`.
        """
        ids, skip = batch.ids, 0
        inputs: dict[str, Tensor] = {"input_ids": ids}
        if prompted and self.prompt is not None:
            skip = len(self.prompt)
            tokens = self.model.get_input_embeddings()(ids)
            inputs = {"inputs_embeds": torch.cat([self.prompt(len(ids)).to(tokens.dtype), tokens], dim=1)}
        positions = torch.arange(ids.size(1) + skip, device=ids.device).expand(len(ids), -1)
        with _positions_not_read():
            hidden = self.model.base_model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
        return hidden[:, skip:].flatten(0, 1)[batch.where]

    def forward(self, batch: MicroBatch, loss: Callable[[Tensor, LMHead], Any], prompted: bool = True) -> Any:
        """Return the loss of the hidden states and the head."""
        return loss(self.hidden_states(batch, prompted), self.lm_head())


@contextlib.contextmanager
def _positions_not_read() -> Iterator[None]:
    """Keep transformers from looking for several sequences in a row, which copies the positions to the host.

    Rows of a micro-batch are one sequence each. Without this, every forward pass would wait for the device.
    """
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def without_dropout(model: nn.Module) -> None:
    """Set all dropout rates to 0. Gradient checkpointing needs train mode, where dropout would be active.

    Models of transformers keep the rates of functional dropout as plain numbers in their modules.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            is_rate = "dropout" in name or name == "layerdrop" or (name == "p" and isinstance(module, nn.Dropout))
            if is_rate and isinstance(value, float):
                setattr(module, name, 0.0)
