"""DeepSpeed in one place: both engines, accumulation over micro-batches, precision."""

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
from promptkd.models.deferred import partition_params
from promptkd.models.tensor_parallel import gather_state_dict, is_tp_sharded
from promptkd.models.wrapper import LanguageModel, LMHead
from promptkd.utils.profiling import part

# Names (parts of them) of parameters without weight decay, as published (utils.py, get_optimizer_params).
NO_DECAY = ("bias", "ln_f.weight", "ln_1.weight", "ln_2.weight")


class TrainEngine:
    """A model with a DeepSpeed engine around it: it learns from a window's micro-batches, one step at a time."""

    def __init__(self, model: LanguageModel, how: OptimizerConfig, config: dict[str, Any], ranks: Ranks) -> None:
        deepspeed = prepare_deepspeed(ranks.device)
        self.ranks, self.how, self.group = ranks, how, model.group
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        plain = [p for name, p in named if any(part in name for part in NO_DECAY)]
        decayed = [p for name, p in named if not any(part in name for part in NO_DECAY)]
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=how.lr, betas=how.betas, weight_decay=how.weight_decay, fused=True,
        )  # fmt: skip
        settings = {
            **config,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # windows hold any number of micro-batches: we set the boundary
            "gradient_clipping": how.clip_grad,
            "steps_per_print": 1 << 40,
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU Adam is compiled at run time
        }
        if zero_stage(config):
            trained = sum(p.numel() for _, p in named)
            settings["zero_optimization"] = with_bucket_for(config["zero_optimization"], trained)
        if zero_stage(config) == 3:
            partition_params(model, settings, DTYPES[precision(config)], ranks.device)
        # The loss reads the head's weight outside the head's own forward: ZeRO-3 has to fetch it for us.
        for parameter in model.lm_head_parameters():
            deepspeed.zero.register_external_parameter(model, parameter)
        self._claim_deepspeed()
        self.engine, _, _, self.schedule = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=make_schedule(optimizer, how),
            config=settings, mpu=self.group,
        )  # fmt: skip
        self.stage = self.engine.zero_optimization_stage()
        self.grad_norm = 0.0
        self.loss_scale = LossScale(self.engine) if self.engine.fp16_enabled() else None

    @property
    def tp_size(self) -> int:
        """Ranks that hold the model together; what they hold is the same on all `shares` groups but for ZeRO."""
        return 1 if self.group is None else self.group.size

    @property
    def dp_rank(self) -> int:
        """Which of the groups this rank is in, and so which of ZeRO's shares of its part of the model it has."""
        return self.ranks.world.dp_rank // self.tp_size

    @property
    def dp_size(self) -> int:
        return self.ranks.world.dp_size // self.tp_size

    @property
    def module(self) -> LanguageModel:
        return self.engine.module

    @property
    def lr(self) -> float:
        return self.schedule.get_last_lr()[0]

    def train(self, mode: bool = True) -> None:
        """Switch dropout on or off."""
        self.engine.train(mode)

    def update(
        self, micro_batches: Sequence[MicroBatch], losses_of: Callable[[MicroBatch], Mapping[str, Term]]
    ) -> dict[str, float]:
        """Take one optimizer step on all micro-batches of a step.

        Args:
            micro_batches: As many on every rank. Their token weights add up to 1 over the step.
            losses_of: Returns the losses of a micro-batch by name. Their sum, weighted by the coefficients, is
                minimized. Micro-batches may have different losses.

        Returns:
            Each loss without its coefficient, summed over micro-batches and ranks: its mean over the step's tokens.
        """
        self._claim_deepspeed()
        totals: dict[str, Tensor] = {}
        values = torch.empty(0)
        for micro_step, batch in enumerate(micro_batches):
            last = micro_step == len(micro_batches) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            losses = losses_of(batch)
            with part("forward and loss"):
                loss, sums = self.engine(batch, self._loss_function(batch, list(losses.values())))
            # Shares are of the mean over all ranks' tokens, but DeepSpeed averages over ranks (the copies of one
            # share of the examples have the same gradient, so it is the shares that count).
            with part("backward"):
                self.engine.backward(loss * self.ranks.dp_size)
            for name, value in zip(losses, sums):
                totals[name] = totals[name] + value if name in totals else value
            if last:
                values = self.ranks.all_reduce_sum(torch.stack(list(totals.values())))
                self.grad_norm = self._norm()
                if not math.isfinite(self.grad_norm):
                    # No update, as ZeRO's optimizers do by themselves.
                    self.module.zero_grad(set_to_none=True)
                    self.engine.set_gradient_accumulation_boundary(False)
            with part("optimizer"):
                if last and self.loss_scale is not None:
                    self.loss_scale.step(bool(values.isfinite().all()))
                else:
                    self.engine.step()
        self.grad_norm = self.grad_norm or float(self.engine.get_global_grad_norm() or 0.0)
        return dict(zip(totals, values.tolist()))

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
        """Leave the weights alone when a gradient is not finite. All but ZeRO 1 and 2 in bf16 do so unasked."""
        if self.stage in (1, 2):
            self.engine.optimizer.check_grad_overflow = True

    def _norm(self) -> float:
        """Stage 0 keeps whole gradients and forgets their norm; the other stages tell it after the step."""
        if self.stage:
            return 0.0
        with_gradient = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if not is_tp_sharded(p)])
        if self.group is None:
            return float(norm)
        parts = (
            torch.nn.utils.get_total_norm([p.grad for p in with_gradient if is_tp_sharded(p)]).square().to(norm.device)
        )
        torch.distributed.all_reduce(parts, group=self.group.group)
        return float((norm.square() + parts).sqrt())

    def _claim_deepspeed(self) -> None:
        """DeepSpeed keeps one model parallel unit for all engines of a process; ours may have different ones."""
        from deepspeed.utils import groups

        groups.mpu = self.group

    @torch.no_grad()
    def hidden_states(self, batch: MicroBatch, prompted: bool = True) -> Tensor:
        """Hidden states at the response positions, without gradient: [response tokens, width]."""
        with part("fixed forward"):
            return self.engine(batch, lambda hidden, head: hidden, prompted)

    @contextlib.contextmanager
    def lm_head(self) -> Iterator[LMHead]:
        """The output head, whole."""
        with self._gathered(self.module.lm_head_parameters()):
            yield self.module.lm_head()

    @contextlib.contextmanager
    def gathered_model(self) -> Iterator[PreTrainedModel]:
        """The transformers model in eval mode with all its weights here, for decoding."""
        self.train(False)
        if self.stage < 3:
            yield self.module.model
            return
        # ZeRO-3's hooks fetch and drop each layer's weights on all ranks in step; decoding ranks are not in step.
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        with unwrap_model_for_generation(self.engine):
            yield self.module.model

    def model_state(self) -> dict[str, Tensor]:
        """The transformers model's weights, whole, in the engine's precision; if sharded, on the first rank alone."""
        if self.group is not None:
            return gather_state_dict(self.module.model)
        if self.stage < 3:
            return self.module.model.state_dict()
        state = self.engine._consolidated_16bit_state_dict() or {}
        return {name.removeprefix("model."): tensor for name, tensor in state.items() if name.startswith("model.")}

    def full_param(self, parameter: torch.nn.Parameter) -> Tensor:
        """A trained parameter in float32, whole, detached: the optimizer's copy where there is one."""
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter)
        return (parameter if value is None else value).detach().float().clone()

    def _gathered(self, parameters: list[torch.nn.Parameter]):
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)


class FrozenModel:
    """A teacher that only answers: no prompt, no gradient, no engine."""

    def __init__(self, model: LanguageModel, device: torch.device) -> None:
        self.module = model.to(device).eval().requires_grad_(False)

    @contextlib.contextmanager
    def gathered_model(self) -> Iterator[PreTrainedModel]:
        """As a Learner's: the transformers model, for decoding."""
        yield self.module.model

    def predict(self, batch: MicroBatch) -> FrozenLogits:
        """Predict the response tokens without gradient, as the target of a loss."""
        return FrozenLogits(self.hidden_states(batch), self)

    @torch.no_grad()
    def hidden_states(self, batch: MicroBatch) -> Tensor:
        with part("fixed forward"):
            return self.module.hidden_states(batch)

    @contextlib.contextmanager
    def lm_head(self) -> Iterator[LMHead]:
        yield self.module.lm_head()
