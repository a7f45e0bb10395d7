"""Sequences that are decoded together, one token of each at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.generation.cached_model import CachedModel, Head, aligned
from promptkd.generation.captured import CapturedStep, can_be_captured
from promptkd.generation.kv_cache import RowMoves
from promptkd.generation.request import GenerationOutput, GenerationRequest
from promptkd.generation.sampling import mask_repeated_ngrams, sample_token, uniform_rows

# Tokens between two looks of the host. On a CPU a look is free. On a GPU it waits for the device.
LOOK_EVERY = {"cpu": 1, "cuda": 8}
# Positions by which the cache of captured steps grows. Attention reads all of them, and growth needs a new graph.
WINDOW = 128
# Captured steps decode finished rows, too, until at most this share of the rows is left. Fewer rows need a new graph,
# which pays off only if many tokens are left.
KEPT_SHARE = 0.25


class Batch:
    """Sequences that are decoded together, one in each row of all tensors.

    A step runs on the device only. It reads the latest token of each row and chooses the next one. After some steps,
    the host looks at the new tokens, moves finished responses to the output and drops their rows. What such a row has
    decoded meanwhile is ignored.

    Args:
        models: The model that decodes, and one that mixes its distribution in, with their output heads.
        request: All prompts.
        indices: The prompts of this batch.
        output: Where responses go.
        broadcast: See `promptkd.generation.decode.decode`.
    """

    def __init__(
        self,
        models: list[tuple[PreTrainedModel, Head]],
        request: GenerationRequest,
        indices: list[int],
        output: GenerationOutput,
        broadcast: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.request, self.output, self.broadcast = request, output, broadcast
        self.device = models[0][0].device
        self.rows: list[int | None] = list(indices)  # the prompt of each row; None if its response has ended
        self._allocated = len(indices)  # rows of the buffers
        self.length = 0  # generated tokens of each row
        self._seen = 0  # those that the host has looked at
        self._host_tokens = np.empty((len(indices), request.max_new_tokens), dtype=np.int64)
        self.states: Tensor | None = None
        self.uniform: Tensor | None = None
        if request.sampling.do_sample:
            keys = [request.rng_keys[i] for i in indices]
            self.uniform = uniform_rows(keys, request.max_new_tokens).to(self.device)
        padding = self._pad_prompts(indices)
        self.models = [CachedModel(*each, padding, self.width) for each in models]
        self._look_every = LOOK_EVERY["cpu" if self.device.type == "cpu" else "cuda"]
        self._captures = can_be_captured(self.models)
        self._graph: CapturedStep | None = None
        # Positions up to which the current graph can write. The last token is chosen but never read.
        self._window = self.width if self._captures else self.width + request.max_new_tokens

    @property
    def is_active(self) -> bool:
        """Whether a response has not ended."""
        return any(index is not None for index in self.rows)

    def advance(self) -> int:
        """Decode some tokens of each row and return how many responses ended."""
        for _ in range(min(self._look_every, self.request.max_new_tokens - self.length)):
            if self.length == 0:
                self._read_prompts()
            else:
                self._step()
            self.length += 1
        return self._look()

    def _step(self) -> None:
        if self._read == self._window:
            self._start_graph()
        if self._graph is None:
            self._decode_token()
        else:
            self._graph(self._decode_token)

    @property
    def _read(self) -> int:
        """Positions that the models have read: all tokens but the latest."""
        return self.width + self.length - 1

    def _pad_prompts(self, indices: list[int]) -> Tensor:
        """Pad prompts on the left, behind the prefix if there is one, and return where padding is."""
        prompts = [np.asarray(self.request.prompts[i], dtype=np.int64) for i in indices]
        prefix_length = 0 if self.request.prefix is None else len(self.request.prefix)
        self.width = prefix_length + max(map(len, prompts))
        front = max(self.request.sampling.no_repeat_ngram_size - 1, 0)
        self.prompt_end = front + self.width
        tokens = np.full((len(prompts), self.prompt_end + self.request.max_new_tokens), -1, dtype=np.int64)
        padding = np.ones((len(prompts), self.width + self.request.max_new_tokens), dtype=np.int64)
        self._starts = [self.width - len(prompt) for prompt in prompts]
        for row, (prompt, start) in enumerate(zip(prompts, self._starts)):
            tokens[row, front + start : self.prompt_end] = prompt
            padding[row, : start - prefix_length] = 0
        self._set_tokens(torch.from_numpy(tokens).to(self.device))
        self.token = self.tokens.new_zeros(len(prompts), 1)  # the latest of each row
        positions = (padding[:, : self.width].cumsum(-1) - 1).clip(min=0)
        self._prompt_positions = torch.from_numpy(positions).to(self.device)
        counters = np.concatenate([[self.width - 1, 0], positions[:, -1]])
        self._set_counters(torch.from_numpy(counters).to(self.device))
        return torch.from_numpy(padding).to(self.device)

    def _set_tokens(self, tokens: Tensor) -> None:
        """Set the tokens of prompts and responses, -1 where there is none yet."""
        self.tokens, self.generated = tokens, tokens[:, self.prompt_end :]

    def _set_counters(self, counters: Tensor) -> None:
        """Set what a step counts up: the latest tokens' position in the cache, number and positions in sequences."""
        self.counters = counters
        self.position, self.number, self.position_ids = counters[:1], counters[1:2], counters[2:, None]

    def _read_prompts(self) -> None:
        """Read the prompts and choose the first token of each row."""
        inputs = {"input_ids": self.tokens[:, self.prompt_end - self.width : self.prompt_end].clamp(min=0)}
        prefix = self.request.prefix
        if prefix is not None:
            embeddings = self.models[0].model.get_input_embeddings()(inputs["input_ids"])
            for row, start in enumerate(self._starts):
                embeddings[row, start - len(prefix) : start] = prefix
            inputs = {"inputs_embeds": embeddings}
        self._choose([model.read_prompts(inputs, self._prompt_positions) for model in self.models])

    def _decode_token(self) -> None:
        """Read the latest token of each row and choose the next one."""
        latest = self.token, self.position_ids, self.position, self._read
        self._choose([model.read_tokens(*latest) for model in self.models])

    def _choose(self, hidden: list[Tensor]) -> None:
        """Choose the next token of each row from the hidden states of all models, on the device."""
        logits = [model.head(states) for model, states in zip(self.models, hidden)]
        if self.request.shared is not None:
            logits = [self.request.shared.restrict(each) for each in logits]
        mixture, sampling = self.request.teacher_mixture, self.request.sampling
        scores = logits[0] if mixture is None else mixture(*logits)
        if sampling.no_repeat_ngram_size:
            end = self.number + self.prompt_end
            mask_repeated_ngrams(scores, self.tokens, end, sampling.no_repeat_ngram_size)
        uniform = None if self.uniform is None else self.uniform.index_select(1, self.number).squeeze(1)
        tokens = sample_token(scores, sampling, uniform)
        if self.broadcast is not None:
            tokens = self.broadcast(tokens)
        self.token.copy_(tokens[:, None])
        self.generated.index_copy_(1, self.number, self.token)
        if self.request.keep_states:
            if self.states is None:
                self.states = hidden[0].new_zeros(len(self.rows), self.request.max_new_tokens, hidden[0].size(1))
            self.states.index_copy_(1, self.number, hidden[0][:, None])
        self.counters.add_(1)

    def _look(self) -> int:
        """Move finished responses to the output and return how many there are."""
        new = self.generated[:, self._seen : self.length].cpu().numpy()  # This waits for the device.
        self._host_tokens[:, self._seen : self.length] = new
        ends = np.isin(new, list(self.request.end_ids))
        finished = 0
        for row in np.flatnonzero(ends.any(1) | (self.length == self.request.max_new_tokens)).tolist():
            index = self.rows[row]
            if index is None:
                continue
            count = self._seen + int(ends[row].argmax()) + 1 if ends[row].any() else self.length
            self.output.responses[index] = torch.from_numpy(self._host_tokens[row, :count].copy())
            if self.states is not None:
                self.output.hidden_states[index] = self.states[row, :count].clone()
            self.rows[row] = None
            finished += 1
        self._seen = self.length
        if finished and self.is_active:
            active = sum(index is not None for index in self.rows)
            left = self.request.max_new_tokens - self.length
            if not self._captures:
                self._drop_finished()
            elif active <= KEPT_SHARE * len(self.rows) and left > WINDOW // 2:
                self._window = self._read  # The next step starts a graph.
        return finished

    def _start_graph(self) -> None:
        """Drop finished rows, allocate room for the next tokens, and capture the following steps in a new graph."""
        self._drop_finished()
        most = self.width + self.request.max_new_tokens - 1
        capacity = aligned(min(self._read + WINDOW, most))
        for model in self.models:
            model.cache.fix(self.position, self._read, capacity)
        self._graph = CapturedStep()
        self._window = min(capacity, most)

    def _drop_finished(self) -> None:
        """Let the last rows take the places of finished ones, and free buffers when half of their rows are gone."""
        active = [row for row, index in enumerate(self.rows) if index is not None]
        count = len(active)
        if count == len(self.rows):
            return
        order = [row if self.rows[row] is not None else active.pop() for row in range(count)]
        frees = 2 * count <= self._allocated
        moves = RowMoves.of(order, frees, self.device)
        for model in self.models:
            model.keep(moves)
        self.rows, self._host_tokens = [self.rows[row] for row in order], self._host_tokens[order]
        self._set_tokens(moves(self.tokens))
        self._set_counters(torch.cat([self.counters[:2], moves(self.counters[2:])]))
        self.token = moves(self.token)
        self.uniform = None if self.uniform is None else moves(self.uniform)
        self.states = None if self.states is None else moves(self.states)
        self._allocated = count if frees else self._allocated
