"""Memory of decoding on one rank, with the core's own bounds (promptkd/utils/memory.py)."""

from __future__ import annotations

from promptkd.planning.held import Parts, free_on_device
from promptkd.planning.setting import Engine, Setting
from promptkd.utils.memory import MOVING_LAYERS, cache_capacity, decoding_tokens, layer_work


def forward_only(engine: Engine, tokens: float) -> float:
    """Compute the peak of a forward pass without gradient, which is inside one layer."""
    shape, cut = engine.shape, engine.tensor
    return engine.size * tokens * layer_work(shape.width, shape.inner // cut, shape.queries // cut, shape.gated)


def decoding(setting: Setting, engine: Engine, rows: int) -> Parts:
    """Compute the memory of decoding `rows` sequences of full length together."""
    shape, b, parts = engine.shape, engine.size, Parts()
    layer = 2 * rows * cache_capacity(setting.max_prompt + engine.prompt, setting.max_new) * shape.keys
    parts["key-value cache"] = (shape.layers + MOVING_LAYERS) * layer // engine.tensor * b
    parts["logits"] = rows * shape.vocab * (b + 3 * 4)  # float32, probabilities, and one more for top-k or top-p
    if setting.hardware.cpu:
        parts["logits"] += shape.head * b  # _decoding_head's transposed copy
    parts["activations"] = forward_only(engine, rows * (setting.max_prompt + engine.prompt))
    parts["gathered weights"] = decoding_weights(engine)
    return parts


def decoding_weights(engine: Engine) -> float:
    """Compute the weights gathered for decoding. Under ZeRO-3 these are all, because ranks decode independently."""
    return engine.size * engine.parameters if engine.stage == 3 else 0.0


def decoding_rows(setting: Setting, engine: Engine, rows: int) -> int:
    """Count the sequences of full length that decode together, at most `rows`, as generation/budget.py does."""
    budget = setting.rollout_token_budget
    if budget is None:
        shape, free = engine.shape, free_on_device(setting)
        if free is not None:
            free -= decoding_weights(engine)
        cache = 2 * shape.layers * shape.keys * engine.size / engine.tensor
        work = engine.size * layer_work(shape.width, shape.inner, shape.queries, gated=True)
        budget = decoding_tokens(setting.hardware.device, free, setting.length, cache, work, shape.layers, shape.vocab)
    return min(rows, max(budget // (setting.length + engine.prompt), 1))
