"""Pairs of models and hidden states to compare."""

from __future__ import annotations

import torch

from helpers.decoding import prompts

CPU = torch.device("cpu")


def pairs(count: int = 6):
    given = prompts(2 * count)
    return given[:count], given[count:]


def states_alone(model, prompt, response, soft=None):
    """Hidden states that predict the response, from one unpadded sequence."""
    ids = torch.as_tensor([*prompt, *response])[None, :-1]
    embedded = model.get_input_embeddings()(ids)
    if soft is not None:
        embedded = torch.cat([soft[None], embedded], 1)
    start = len(prompt) - 1 + (0 if soft is None else len(soft))
    return model.base_model(inputs_embeds=embedded).last_hidden_state[0, start:]
