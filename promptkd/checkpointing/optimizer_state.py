"""Extract the state of an engine as plain tensors and numbers, and restore it bit for bit.

DeepSpeed keeps the state in a different place for each ZeRO stage (runtime/zero/stage_1_and_2.py, stage3.py). A
model's weights are always the float32 master weights in lower precision, so these and the optimizer states suffice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from promptkd.checkpointing.repartition import RepartitionedState, pieces_of
from promptkd.engine.engine import TrainEngine
from promptkd.engine.loss_scale import LOSS_SCALE
from promptkd.errors import UserError
from promptkd.models.checks import is_finite
from promptkd.weights.safetensors_io import TensorFile

SCHEDULE = ("last_epoch", "_step_count", "_last_lr")
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def is_sharded(learner: TrainEngine) -> bool:
    """Return whether each data-parallel rank has a state of its own. Without ZeRO all have the same."""
    return learner.stage > 0


def state_tensors(learner: TrainEngine) -> dict[str, Tensor]:
    """Return this rank's master weights ("<i>") and optimizer states ("<i>.<name>"), not copied.

    With ZeRO, "<i>.pieces" maps their elements to parameters, see `pieces_of`.

    Raises:
        UserError: The optimizer keeps its state on disk (ZeRO-Infinity).
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
    """Return learning rates, the schedule's position, counters and the loss scale. They are the same on all ranks."""
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


def saved_state(learner: TrainEngine, files: list[TensorFile]) -> Mapping[str, Tensor]:
    """Return this rank's tensors from the files of all data-parallel ranks of the run that saved them."""
    if not is_sharded(learner):
        return files[0]
    if len(files) == learner.dp_size:
        return files[learner.dp_rank]
    return RepartitionedState(learner, files, [master.numel() for master in _masters(learner)])


@torch.no_grad()
def restore(learner: TrainEngine, tensors: Mapping[str, Tensor], numbers: dict[str, Any]) -> None:
    """Restore what `state_tensors` and `state_numbers` returned. All ranks call it.

    Args:
        learner: The engine to restore.
        tensors: The tensors by name. Each is read once, so they may be on disk.
        numbers: The numbers.

    Raises:
        UserError: The state does not fit the engine.
    """
    optimizer = _torch_optimizer(learner)
    masters = _masters(learner)
    names: dict[str, list[str]] = {str(i): [] for i in range(len(masters))}
    for name in tensors:
        place, _, kind = name.partition(".")
        if place not in names:
            raise UserError("the checkpoint holds another model's state: name another folder as --save")
        names[place] += [kind] if kind not in ("", "pieces") else []
    for i, master in enumerate(masters):
        _fill(master, tensors[str(i)])
        if not is_finite(master):
            raise UserError("the checkpoint holds weights that are not finite: --overwrite starts a new run")
        _restore_states(optimizer, master, {kind: tensors[f"{i}.{kind}"] for kind in names[str(i)]})
    _restore_numbers(learner, numbers)
    _cast_down(learner)


def _restore_states(optimizer: torch.optim.Optimizer, master: Tensor, saved: dict[str, Tensor]) -> None:
    """Give the optimizer the states of one master, each in the shape, precision and device that it needs.

    torch's optimizers create states in their first step only. A fused one keeps the step counter on the master's
    device, others on the CPU. A parameter of one element shows what this optimizer creates.
    """
    examples = _example_states(optimizer, master)
    if saved and saved.keys() != examples.keys():
        raise UserError(
            f"the checkpoint holds the optimizer states {', '.join(sorted(saved))} where the run has "
            f"{', '.join(sorted(examples))}: resume with the versions of torch and DeepSpeed that wrote it"
        )
    for name, value in saved.items():
        example = examples[name]
        target = torch.empty_like(master if example.ndim else example, dtype=example.dtype, device=example.device)
        _fill(target, value)
        optimizer.state[master][name] = target


def _example_states(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """Return the states that an optimizer creates for one element with the master's precision and device."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=master.dtype, device=master.device))
    parameter.grad = torch.zeros_like(parameter)
    fresh = type(optimizer)([parameter])  # type: ignore[call-arg]  # only the base class needs defaults
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
    """Return the object that holds the loss scale. ZeRO's optimizers always have one, others only in fp16."""
    return getattr(learner.engine.optimizer, "loss_scaler", None)


def _fill(target: Tensor, saved: Tensor) -> None:
    if target.shape != saved.shape or target.dtype != saved.dtype:
        raise UserError(
            f"the checkpoint holds a state of shape {list(saved.shape)} and {saved.dtype} where the run has "
            f"{list(target.shape)} and {target.dtype}: give the same model, ranks and DeepSpeed file"
        )
    target.data.copy_(saved)


def _restore_numbers(learner: TrainEngine, numbers: dict[str, Any]) -> None:
    groups, schedule = _torch_optimizer(learner).param_groups, numbers["schedule"]
    if {len(groups)} != {len(numbers["groups"]), len(schedule["_last_lr"])}:
        raise UserError("the number of parameter groups differs from the run's: resume with the same model")
    for group, saved in zip(groups, numbers["groups"]):
        group.update({key: value for key, value in saved.items() if key in group})
    for key in SCHEDULE:
        setattr(learner.schedule, key, schedule[key])
    for key in COUNTERS:
        setattr(learner.engine, key, numbers["counters"][key])
    for key, value in numbers["loss_scale"].items():
        setattr(_loss_scaler(learner), key, value)


def _cast_down(learner: TrainEngine) -> None:
    """Copy the master weights to the model's weights, as an optimizer step does."""
    optimizer = learner.engine.optimizer
    if learner.stage in (1, 2):
        optimizer.update_lp_params()
    elif learner.stage == 3:
        optimizer.checkpoint_event_prologue()  # drops gathered parameters
        for low, master in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat):
            low.data.copy_(master.data)
        optimizer.checkpoint_event_epilogue()
