"""DeepSpeed engines: the model that is trained, gradient accumulation, and frozen models."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from promptkd.config.deepspeed import DTYPES, precision, prepare_deepspeed, with_bucket_for, zero_stage
from promptkd.data.batching import MicroBatch
from promptkd.distributed.ranks import Ranks
from promptkd.engine.loss_scale import LossScale
from promptkd.engine.optim import OptimizerConfig, make_schedule
from promptkd.losses import FrozenLogits, Term, fused_loss
from promptkd.models.adapters import merged
from promptkd.models.deferred import partition_params
from promptkd.models.tensor_parallel import gather_state_dict, is_tp_sharded
from promptkd.models.wrapper import LanguageModel, LMHead
from promptkd.utils.profiling import part

# Names (parts of them) of parameters without weight decay, as published (utils.py, get_optimizer_params).
NO_DECAY = ("bias", "ln_f.weight", "ln_1.weight", "ln_2.weight")


class TrainEngine:
    """A model in a DeepSpeed engine, which takes one optimizer step on all micro-batches of a step.

    Args:
        model: The model. Parameters that require a gradient are trained.
        optimization: Hyperparameters of optimizer and schedule.
        config: DeepSpeed configuration.
        ranks: This process's position.
    """

    def __init__(
        self, model: LanguageModel, optimization: OptimizerConfig, config: dict[str, Any], ranks: Ranks
    ) -> None:
        deepspeed = prepare_deepspeed(ranks.device)
        self.ranks, self.group = ranks, model.group
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        plain = [p for name, p in named if any(part in name for part in NO_DECAY)]
        decayed = [p for name, p in named if not any(part in name for part in NO_DECAY)]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=optimization.lr, betas=optimization.betas, weight_decay=optimization.weight_decay, fused=True,
        )  # fmt: skip
        settings = {
            **config,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # `update` sets the boundary itself
            "gradient_clipping": optimization.clip_grad,
            "steps_per_print": 1 << 40,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device in each forward pass and step
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed would compile its own Adam for CPUs
        }
        if zero_stage(config):
            trained = sum(p.numel() for _, p in named)
            settings["zero_optimization"] = with_bucket_for(config["zero_optimization"], trained)
        if zero_stage(config) == 3:
            partition_params(model, settings, DTYPES[precision(config)], ranks.device)
        # The loss reads the head's weight outside of the head's forward pass, so ZeRO-3 has to know of it.
        for parameter in model.lm_head_parameters():
            deepspeed.zero.register_external_parameter(model, parameter)
        self._claim_deepspeed()
        self.engine, _, _, self.schedule = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=make_schedule(optimizer, optimization),
            config=settings, mpu=self.group,
        )  # fmt: skip
        self.stage = self.engine.zero_optimization_stage()
        self.grad_norm = 0.0
        self.loss_scale = LossScale(self.engine) if self.engine.fp16_enabled() else None

    @property
    def tp_size(self) -> int:
        """Number of tensor-parallel ranks that hold the model."""
        return 1 if self.group is None else self.group.size

    @property
    def dp_rank(self) -> int:
        """Index of this rank's group, and of its ZeRO partition."""
        return self.ranks.world.dp_rank // self.tp_size

    @property
    def dp_size(self) -> int:
        """Number of such groups, and of ZeRO partitions."""
        return self.ranks.world.dp_size // self.tp_size

    @property
    def module(self) -> LanguageModel:
        module: LanguageModel = self.engine.module
        return module

    @property
    def lr(self) -> float:
        """The current learning rate."""
        return float(self.schedule.get_last_lr()[0])

    def train(self, mode: bool = True) -> None:
        """Switch between training mode, with dropout, and evaluation mode."""
        self.engine.train(mode)

    def update(
        self, micro_batches: Sequence[MicroBatch], losses_of: Callable[[MicroBatch], Mapping[str, Term]]
    ) -> dict[str, float]:
        """Take one optimizer step on all micro-batches of a step.

        Args:
            micro_batches: As many on every rank. For each kind of responses, their token weights add up to 1.
            losses_of: Returns the losses of a micro-batch by name. Their sum, weighted by the coefficients, is
                minimized. Micro-batches may have different losses.

        Returns:
            Each loss without its coefficient, summed over micro-batches and ranks: its mean over the step's tokens.
        """
        self._claim_deepspeed()
        totals: dict[str, Tensor] = {}
        for micro_step, batch in enumerate(micro_batches):
            last = micro_step == len(micro_batches) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            losses = losses_of(batch)
            with part("forward and loss"):
                loss, sums = self.engine(batch, self._loss_function(batch, list(losses.values())))
            # Token weights belong to the mean over all ranks, while DeepSpeed averages the gradients of ranks.
            with part("backward"):
                self.engine.backward(loss * self.ranks.dp_size)
            for name, value in zip(losses, sums):
                totals[name] = totals[name] + value if name in totals else value
            if not last:
                self.engine.step()
        sums = self.ranks.all_reduce_sum(torch.stack(list(totals.values())))
        with part("optimizer"):
            return dict(zip(totals, self._step(sums)))

    def _step(self, sums: Tensor) -> list[float]:
        """Take the optimizer's step and return the losses. Reading the device waits for it, so that is done once."""
        if self.stage == 0:
            values, self.grad_norm = _read(sums, self._norm())
            if not math.isfinite(self.grad_norm):
                # Skip the update, as ZeRO's optimizers do.
                self.module.zero_grad(set_to_none=True)
                self.engine.set_gradient_accumulation_boundary(False)
            self.engine.step()
            return values
        (self.loss_scale or self.engine).step()
        values, self.grad_norm = _read(sums, self.engine.get_global_grad_norm())
        if self.loss_scale is not None:
            self.loss_scale.settle(all(map(math.isfinite, values)))
        return values

    def _loss_function(self, batch: MicroBatch, losses: list[Term]) -> Callable[[Tensor, LMHead], Any]:
        """Return the fused loss of a micro-batch as a function of the trained model's hidden states and head."""

        def loss_function(hidden: Tensor, lm_head: LMHead) -> Any:
            with contextlib.ExitStack() as heads:
                opened = [
                    loss.with_head(lambda model: lm_head if model is self else heads.enter_context(model.lm_head()))
                    for loss in losses
                ]
                return fused_loss(hidden, lm_head, opened, batch.token_weights)

        return loss_function

    def predict(self, batch: MicroBatch, prompted: bool = True) -> FrozenLogits:
        """Predict the response tokens without gradient, as the target of a loss. The head is opened by the loss."""
        return FrozenLogits(self.hidden_states(batch, prompted), self)

    def drop_nonfinite(self) -> None:
        """Skip updates with non-finite gradients. Only ZeRO-1 and ZeRO-2 in bf16 need to be told."""
        if self.stage in (1, 2):
            self.engine.optimizer.check_grad_overflow = True

    def _norm(self) -> Tensor:
        """Compute the gradient norm under stage 0, which does not keep it. Other stages return it after the step."""
        gradients = [(p.grad, is_tp_sharded(p)) for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([grad for grad, sharded in gradients if not sharded])
        if self.group is None:
            return norm
        shards = torch.nn.utils.get_total_norm([grad for grad, sharded in gradients if sharded])
        squares = shards.square().to(norm.device)
        torch.distributed.all_reduce(squares, group=self.group.group)
        return (norm.square() + squares).sqrt()

    def _claim_deepspeed(self) -> None:
        """Make this engine's tensor-parallel group DeepSpeed's, which has only one for all engines of a process."""
        from deepspeed.utils import groups

        groups.mpu = self.group

    @torch.no_grad()
    def hidden_states(self, batch: MicroBatch, prompted: bool = True) -> Tensor:
        """Compute the hidden states that predict the response tokens, `(tokens, hidden)`, without gradient."""
        with part("forward without gradient"):
            hidden: Tensor = self.engine(batch, lambda hidden, head: hidden, prompted)
            return hidden

    @contextlib.contextmanager
    def lm_head(self) -> Iterator[LMHead]:
        """Lend the output head, gathered from all ranks under ZeRO-3."""
        with self._gathered(self.module.lm_head_parameters()):
            yield self.module.lm_head()

    @contextlib.contextmanager
    def gathered_model(self) -> Iterator[PreTrainedModel]:
        """Lend the transformers model in evaluation mode, for decoding.

        Under ZeRO-3 its weights are gathered. LoRA adapters are merged into them until the end of the block.
        """
        self.train(False)
        with contextlib.ExitStack() as stack:
            if self.stage == 3:
                # ZeRO-3's hooks gather each layer on all ranks at once, but ranks decode answers of different lengths.
                from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

                stack.enter_context(unwrap_model_for_generation(self.engine))
            stack.enter_context(merged(self.module.model))
            yield self.module.model

    def model_state(self) -> dict[str, Tensor]:
        """Return the weights of the transformers model in the engine's precision.

        Partitioned weights are gathered on the first rank only.
        """
        if self.group is not None:
            return gather_state_dict(self.module.model)
        if self.stage < 3:
            return self.module.model.state_dict()
        state = self.engine._consolidated_16bit_state_dict() or {}
        return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}

    def full_param(self, parameter: torch.nn.Parameter) -> Tensor:
        """Return a trained parameter in float32, gathered and detached: the optimizer's master copy if it has one."""
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter)
        return (parameter if value is None else value).detach().float().clone()

    def _gathered(self, parameters: list[torch.nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        gathered: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters)
        return gathered


def _read(sums: Tensor, norm: Tensor | float | None) -> tuple[list[float], float]:
    """Copy losses and gradient norm to the host, together if both are on the device."""
    if isinstance(norm, Tensor) and norm.device == sums.device:
        *values, value = torch.stack([*sums, norm.reshape(())]).tolist()
        return values, value
    return sums.tolist(), float(norm or 0.0)


class FrozenModel:
    """A model that only predicts, without gradient and without a DeepSpeed engine."""

    def __init__(self, model: LanguageModel, device: torch.device) -> None:
        self.module = model.to(device).eval().requires_grad_(False)

    @contextlib.contextmanager
    def gathered_model(self) -> Iterator[PreTrainedModel]:
        """Lend the transformers model, for decoding."""
        yield self.module.model

    def predict(self, batch: MicroBatch) -> FrozenLogits:
        """Predict the response tokens without gradient, as the target of a loss."""
        return FrozenLogits(self.hidden_states(batch), self)

    @torch.no_grad()
    def hidden_states(self, batch: MicroBatch) -> Tensor:
        """Compute the hidden states that predict the response tokens, `(tokens, hidden)`."""
        with part("forward without gradient"):
            return self.module.hidden_states(batch)

    @contextlib.contextmanager
    def lm_head(self) -> Iterator[LMHead]:
        """Lend the output head."""
        yield self.module.lm_head()
