"""The sum of losses over all response tokens, in chunks, with the gradient by hand.

Logits exist for one chunk of positions at a time. The gradient with respect to them is known in closed form
(`promptkd.losses.terms`), so no graph over logits is kept. `reference_loss` is the plain form for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from promptkd.distributed.device import free_memory
from promptkd.losses.rows import log_ratio, row_dot
from promptkd.losses.terms import CrossEntropy, Divergence, FrozenLogits, Term
from promptkd.models.vocabulary import SharedVocabulary
from promptkd.models.wrapper import LMHead
from promptkd.utils.memory import BLOCK, CHUNK, positions_per_chunk


def positions_at_a_time(head: LMHead, references: int = 0) -> int:
    """Positions of one chunk: fewer with a larger vocabulary, and on a GPU with little free memory.

    With deterministic algorithms, free memory does not count, because chunks change the rounding.

    Args:
        head: The output head.
        references: Models whose logits are computed beside those of the head.
    """
    weight = head.weight
    device = weight.device.type if weight.device.type in CHUNK else "cuda"
    free = None if torch.are_deterministic_algorithms_enabled() else free_memory(weight.device)
    return positions_per_chunk(len(weight) - head.padding, device, free, weight.itemsize, references)


def log_probs(model: FrozenLogits, tokens: Tensor) -> Tensor:
    """log p(token) at each position: float32 [tokens]. One chunk of logits at a time."""
    step = positions_at_a_time(model.open_head)
    parts = [
        model.logits(slice(i, i + step)).float().log_softmax(-1).gather(1, tokens[i : i + step, None]).squeeze(1)
        for i in range(0, len(tokens), step)
    ]
    return torch.cat([tokens.new_empty(0, dtype=torch.float32), *parts])


def kl_divergences(p: FrozenLogits, q: FrozenLogits) -> Tensor:
    """KL(p || q) at each position: float32 [tokens]. One chunk of logits at a time."""
    step = positions_at_a_time(p.open_head, references=1)
    parts = [p.hidden.new_empty(0, dtype=torch.float32)]
    for start in range(0, len(p.hidden), step):
        log_p, log_q = (model.logits(slice(start, start + step)).float().log_softmax(-1) for model in (p, q))
        probabilities = log_p.exp()
        parts.append(row_dot(probabilities, log_ratio(log_p, log_q, probabilities)))
    return torch.cat(parts)


def reference_loss(hidden: Tensor, head: LMHead, terms: list[Term], weights: Tensor) -> tuple[Tensor, Tensor]:
    """What `fused_loss` computes, with all logits at once and autograd: the reference."""
    logits = F.linear(hidden, head.weight, head.bias)
    plain = [term.plain(logits if isinstance(term, CrossEntropy) else head.restrict(logits)) for term in terms]
    sums = torch.stack([(losses * weights).sum() for losses in plain])
    return _weighted(terms, sums), sums.detach()


def fused_loss(hidden: Tensor, head: LMHead, terms: list[Term], weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of `terms` over all tokens, never more than one chunk of logits in memory.

    hidden [tokens, width] and head: of the trained model; weights float32 [tokens]: each token's share.
    Returns the loss (scalar, differentiable in hidden and head) and each term's own weighted sum without
    its coefficient (float32 [terms], for the log).
    """
    result: tuple[Tensor, Tensor] = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head.shared, terms, weights
    )
    return result


def _weighted(terms: Sequence[Term], sums: Tensor) -> Tensor:
    """Return the sum of the terms with their coefficients, which stay on the host: a copy waits for the device."""
    return torch.stack([value * term.coefficient for value, term in zip(sums, terms)]).sum()


class _FusedLoss(torch.autograd.Function):
    """The gradient is known in closed form, so it is computed in the forward pass, chunk by chunk.

    A token's weight is often far below what float16 can hold (1/18,000, before the loss scale arrives). So the
    products with the logits' gradient leave it out, and `backward` multiplies by weight and loss scale together, in
    float32. Only the result is cast: what float16 cannot hold becomes infinite, and the loss scaler sees it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shared: SharedVocabulary | None,
        terms: Sequence[Term],
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head = LMHead(weight, bias, shared).aligned()
        sums = hidden.new_zeros(len(terms), dtype=torch.float32)
        factors = torch.empty_like(weights)  # of each token's row in grad_hidden
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Summed in float32: many chunks in bfloat16 would lose what the last ones add.
        grad_weight = torch.zeros_like(head.weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(head.bias, dtype=torch.float32) if head.bias is not None and needs_bias else None
        step = positions_at_a_time(head, references=sum(isinstance(term, Divergence) for term in terms))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            grad, factors[rows] = _chunk(rows, hidden, head, terms, weights, sums)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ head.weight
            if grad_weight is not None:
                _add_product(grad_weight, grad, hidden[rows], factors[rows, None])
            if grad_bias is not None:
                grad_bias.add_((grad.float() * factors[rows, None]).sum(0))
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        grad_weight, grad_bias = (None if grad is None else grad[: len(weight)] for grad in (grad_weight, grad_bias))
        ctx.save_for_backward(grad_hidden, factors, grad_weight, grad_bias)
        ctx.mark_non_differentiable(sums)
        return _weighted(terms, sums), sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, factors, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            # In place, but computed in float32: the factors are of that type and have a dimension.
            None if grad_hidden is None else grad_hidden.mul_((factors * grad_loss)[:, None]),
            None if grad_weight is None else grad_weight.mul_(grad_loss).to(weight_dtype),
            None if grad_bias is None else grad_bias.mul_(grad_loss).to(bias_dtype),
            None,
            None,
            None,
        )


def _chunk(
    rows: slice, hidden: Tensor, head: LMHead, terms: Sequence[Term], weights: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the chunk's losses to `sums`. Returns the gradient of the sum of terms with respect to the logits.

    Returns:
        The gradient [rows, rows of the head's weight] in the head's precision, and float32 factors [rows]. A token's
        part of the loss's gradient is its row times its factor, which is its weight but for float16's row scale.
    """
    padded = head.product(hidden[rows])
    logits = padded[:, : padded.size(1) - head.padding]
    block_losses = [term.of_chunk(rows) for term in terms]
    step = BLOCK.get(hidden.device.type, BLOCK["cuda"])
    factors = weights[rows].clone()
    for start in range(0, len(logits), step):
        block = slice(start, start + step)
        log_q = logits[block].log_softmax(-1, dtype=torch.float32)
        q = log_q.exp()
        total: Tensor | None = None
        shared_log_q, shared_q = log_q, q
        if head.shared is not None:
            shared_log_q = head.restrict(log_q).log_softmax(-1)
            shared_q = shared_log_q.exp()
        for i, (term, block_loss) in enumerate(zip(terms, block_losses)):
            if isinstance(term, CrossEntropy):
                loss, grad = block_loss(block, log_q, q)
            else:
                loss, grad = block_loss(block, shared_log_q, shared_q)
                if grad.size(-1) < q.size(-1):
                    grad = F.pad(grad, (0, q.size(-1) - grad.size(-1)))  # no gradient for other ids
            sums[i] += torch.dot(loss, weights[rows][block])
            if term.coefficient != 1.0:
                grad.mul_(term.coefficient)
            total = grad if total is None else total.add_(grad)
        assert total is not None, "a micro-batch has at least one term"
        if logits.dtype == torch.float16:
            scale = _row_scale(total, rows.stop - rows.start)
            total.mul_(scale[:, None])
            factors[block].div_(scale)
        logits[block] = total  # the logits have served: their place takes the gradient
    if head.padding:
        padded[:, -head.padding :] = 0
    return padded, factors


def _row_scale(grad: Tensor, rows: int) -> Tensor:
    """Powers of two [rows] that bring gradients of logits into float16's range.

    Most entries are near 1/vocabulary, too small for float16, and a policy's advantages or a student near its teacher
    make them smaller. A row's absolute values are scaled to a sum of at most 2^15 / `rows`. So no sum over a chunk of
    `rows` tokens can overflow, as long as what it is multiplied with is at most 1 (see `_add_product`). The limit of
    256 is for the product with the head's weights.
    """
    largest = min(2**15 / rows, 256.0)
    return _power_of_two(largest / torch.linalg.vector_norm(grad, ord=1, dim=-1).clamp_(min=1e-30))


def _power_of_two(values: Tensor) -> Tensor:
    """The largest powers of two that are not above positive `values`."""
    return values.log2().floor_().exp2_()


def _add_product(total: Tensor, grad: Tensor, hidden: Tensor, factors: Tensor) -> None:
    """total += grad^T (hidden * factors), in float32. The product itself is in the precision of `grad`."""
    if grad.dtype == total.dtype:
        total.addmm_(grad.T, hidden * factors)
        return
    # Factors of at most 1, where equal weights give exactly 1, then hidden states of at most 1: nothing overflows.
    largest = factors.amax().clamp_(min=1e-30)
    scaled = hidden * (factors / largest)
    size = 1 / _power_of_two(1 / scaled.abs().amax().clamp_(min=1e-30))
    product = grad.T @ (scaled / size).to(grad.dtype)
    total.addcmul_(product, largest * size)
