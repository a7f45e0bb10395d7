"""What a Learner carries from step to step, as plain tensors and numbers: to be saved, and put back bit for bit.

DeepSpeed keeps it in a different place for each ZeRO stage (runtime/zero/stage_1_and_2.py, stage3.py). The
weights a model computes with are always the float32 masters cast down, so masters and optimizer states suffice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from promptkd.checkpointing.repartition import Resharded, pieces_of
from promptkd.engine.engine import TrainEngine
from promptkd.engine.loss_scale import LOSS_SCALE
from promptkd.errors import UserError
from promptkd.models.checks import is_finite
from promptkd.weights.safetensors_io import TensorFile

SCHEDULE = ("last_epoch", "_step_count", "_last_lr")
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def is_sharded(learner: TrainEngine) -> bool:
    """Whether each of a learner's shares has a state of its own; without ZeRO all have the same."""
    return learner.stage > 0


def state_tensors(learner: TrainEngine) -> dict[str, Tensor]:
    """This rank's masters ("<i>") and their optimizer states ("<i>.<name>"): the live tensors, not copies.

    With ZeRO, "<i>.pieces" tells which elements of which parameters they are.

    Raises UserError when the optimizer keeps them on disk (ZeRO-Infinity).
    """
    if getattr(learner.engine.optimizer, "swap_optimizer", False):
        raise UserError("checkpoints of an optimizer on NVMe are not supported: --keep-checkpoints 0 turns them off")
    tensors: dict[str, Tensor] = {}
    optimizer = _torch_optimizer(learner)
    for i, master in enumerate(_masters(learner)):
        tensors[str(i)] = master.detach()
        for name, value in sorted(optimizer.state.get(master, {}).items()):
            tensors[f"{i}.{name}"] = torch.as_tensor(value)
        if is_sharded(learner):
            tensors[f"{i}.pieces"] = pieces_of(learner, i)
    return tensors


def state_numbers(learner: TrainEngine) -> dict[str, Any]:
    """Rates, the schedule's place, counters, and the loss scale where there is one. The same on all ranks."""
    groups = _torch_optimizer(learner).param_groups
    numbers = {
        "stage": learner.stage,
        "groups": [{k: v for k, v in group.items() if isinstance(v, (int, float))} for group in groups],
        "schedule": {key: getattr(learner.schedule, key) for key in SCHEDULE},
        "counters": {key: getattr(learner.engine, key) for key in COUNTERS},
    }
    scaler = _loss_scaler(learner)
    numbers["loss_scale"] = {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}
    return numbers


def saved_state(learner: TrainEngine, files: list[TensorFile]) -> Mapping[str, Tensor] | Resharded:
    """This rank's tensors in the files of all shares of its part of the model, however many shares there were."""
    if not is_sharded(learner):
        return files[0]
    if len(files) == learner.dp_size:
        return files[learner.dp_rank]
    return Resharded(learner, files, [master.numel() for master in _masters(learner)])


@torch.no_grad()
def restore(learner: TrainEngine, tensors: Mapping[str, Tensor] | Resharded, numbers: dict[str, Any]) -> None:
    """Put back what `state_tensors` and `state_numbers` gave. All ranks call it.

    `tensors` may read from disk: each is fetched once. Raises UserError when sizes do not fit.
    """
    optimizer = _torch_optimizer(learner)
    masters = _masters(learner)
    names: dict[str, list[str]] = {str(i): [] for i in range(len(masters))}
    for name in tensors:
        place, _, kind = name.partition(".")
        if place not in names:
            raise UserError("the checkpoint holds another model's state: --save names another folder")
        names[place] += [kind] if kind not in ("", "pieces") else []
    for i, master in enumerate(masters):
        _fill(master, tensors[str(i)])
        if not is_finite(master):
            raise UserError("the checkpoint holds weights that are not finite: --overwrite starts anew")
        _restore_states(optimizer, master, {kind: tensors[f"{i}.{kind}"] for kind in names[str(i)]})
    _restore_numbers(learner, numbers)
    _cast_down(learner)


def _restore_states(optimizer: torch.optim.Optimizer, master: Tensor, saved: dict[str, Tensor]) -> None:
    """Put one master's states where the optimizer reads them: each in the shape, precision and device that it needs.

    torch's optimizers create states in their first step only. A fused one keeps the step counter on the master's
    device, another one on the CPU. So a parameter of one element shows what this optimizer creates.
    """
    examples = _example_states(optimizer, master)
    if saved and saved.keys() != examples.keys():
        raise UserError(
            f"the checkpoint holds the optimizer states {', '.join(sorted(saved))} where the run has "
            f"{', '.join(sorted(examples))}: resume it with the version that it was made with"
        )
    for name, value in saved.items():
        example = examples[name]
        target = torch.empty_like(master if example.ndim else example, dtype=example.dtype, device=example.device)
        _fill(target, value)
        optimizer.state[master][name] = target


def _example_states(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """The states that `optimizer` creates for a parameter of one element with the master's precision and device."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=master.dtype, device=master.device))
    parameter.grad = torch.zeros_like(parameter)
    fresh = type(optimizer)([parameter])
    options = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    fresh.param_groups[0].update(options)
    fresh.step()
    return {name: torch.as_tensor(value) for name, value in fresh.state[parameter].items()}


def _masters(learner: TrainEngine) -> list[Tensor]:
    if learner.stage == 3:
        return learner.engine.optimizer.fp32_partitioned_groups_flat
    return [master for group in _torch_optimizer(learner).param_groups for master in group["params"]]


def _torch_optimizer(learner: TrainEngine) -> torch.optim.Optimizer:
    optimizer = learner.engine.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def _loss_scaler(learner: TrainEngine) -> Any:
    """The object that holds the loss scale. ZeRO's optimizers have one in every precision, others have none."""
    return getattr(learner.engine.optimizer, "loss_scaler", None)


def _fill(target: Tensor, saved: Tensor) -> None:
    if target.shape != saved.shape or target.dtype != saved.dtype:
        raise UserError(
            f"the checkpoint holds a state of shape {list(saved.shape)} and {saved.dtype} where the run has "
            f"{list(target.shape)} and {target.dtype}: model, ranks and DeepSpeed file must be those it was made with"
        )
    target.data.copy_(saved)


def _restore_numbers(learner: TrainEngine, numbers: dict[str, Any]) -> None:
    groups, schedule = _torch_optimizer(learner).param_groups, numbers["schedule"]
    if {len(groups)} != {len(numbers["groups"]), len(schedule["_last_lr"])}:
        raise UserError("the checkpoint holds another number of parameter groups than the run has: another model's?")
    for group, saved in zip(groups, numbers["groups"]):
        group.update({key: value for key, value in saved.items() if key in group})
    for key in SCHEDULE:
        setattr(learner.schedule, key, schedule[key])
    for key in COUNTERS:
        setattr(learner.engine, key, numbers["counters"][key])
    for key, value in numbers["loss_scale"].items():
        setattr(_loss_scaler(learner), key, value)


def _cast_down(learner: TrainEngine) -> None:
    """Make the weights that the model computes with from the masters, as an optimizer step ends."""
    optimizer = learner.engine.optimizer
    if learner.stage in (1, 2):
        optimizer.update_lp_params()
    elif learner.stage == 3:
        optimizer.checkpoint_event_prologue()  # drops whole copies of parameters
        for low, master in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat):
            low.data.copy_(master.data)
        optimizer.checkpoint_event_epilogue()
