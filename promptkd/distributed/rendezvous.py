"""Connect the ranks of a run, and disconnect them at its end."""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch
import torch.distributed as dist

from promptkd.errors import RunError, UserError

# How long ranks wait for each other at the start. Some may still import libraries, but none loads a model before.
RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=5)
# How long a rank waits for the others in a collective. One of them may be writing a checkpoint.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


def environment_number(name: str, default: int = 0) -> int:
    """Return an integer that a launcher has set in the environment, or raise UserError if it is not one."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name}={text[:32]!r} in the environment is not a number: unset it, or start with torchrun")
    return int(text)


def tensor_parallel_groups(processes: int, size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Create this process's tensor-parallel group of `size` neighbors, and its data-parallel group.

    All processes call it.
    """
    tp_ranks = [list(range(start, start + size)) for start in range(0, processes, size)]
    dp_ranks = [list(column) for column in zip(*tp_ranks)]
    tp_group, _ = dist.new_subgroups_by_enumeration(tp_ranks, timeout=COLLECTIVE_TIMEOUT)
    dp_group, _ = dist.new_subgroups_by_enumeration(dp_ranks, timeout=COLLECTIVE_TIMEOUT)
    return tp_group, dp_group


def _open_store(rank: int, size: int) -> dist.Store:
    """Open the store where ranks exchange addresses: torchrun's, or one that the first rank creates."""
    if size == 1:
        return dist.HashStore()  # needs no port
    inherited = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = os.environ["MASTER_ADDR"], environment_number("MASTER_PORT")
    store = dist.TCPStore(*address, size, is_master=rank == 0 and not inherited, timeout=RENDEZVOUS_TIMEOUT)
    return fresh_prefix_store(store, rank, size) if inherited else store


def fresh_prefix_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Return a part of `store` that only the ranks of this start write to.

    torchrun keeps one store over its restarts, and torch (2.13) leaves the addresses of dead ranks in it under the
    names that new ranks use. Some would connect to nobody (pytorch issue 135712). Starts have no common number: each
    machine counts its own failures (TORCHELASTIC_RESTART_COUNT). So each rank asks under a new random name. The first
    rank answers all names, and continues when all ranks of this start have its answer.

    Raises:
        DistStoreError: A rank has not come within RENDEZVOUS_TIMEOUT.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"promptkd/asks/{rank}", name)
        part = store.get(f"promptkd/answer/{name}").decode()
        store.set(f"{part}/has/{rank}", "")
        return dist.PrefixStore(part, store)
    others, end = range(1, size), time.monotonic() + RENDEZVOUS_TIMEOUT.total_seconds()
    while not store.check([f"{name}/has/{other}" for other in others]):
        for other in others:
            if store.check([f"promptkd/asks/{other}"]):  # a rank of an earlier start may have asked: harmless
                store.set(f"promptkd/answer/{store.get(f'promptkd/asks/{other}').decode()}", name)
        if time.monotonic() > end:
            raise dist.DistStoreError(f"some ranks did not come within {RENDEZVOUS_TIMEOUT.total_seconds():.0f} s")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def check_own_gpus(store: dist.Store, rank: int, size: int, device: torch.device) -> None:
    """Raise UserError if two ranks would use the same GPU. NCCL would refuse that later, in many lines."""
    store.set(f"promptkd/gpu/{rank}", str(torch.cuda.get_device_properties(device).uuid))
    ranks: dict[bytes, int] = {}
    for other in range(size):
        first = ranks.setdefault(store.get(f"promptkd/gpu/{other}"), other)
        if first != other:
            raise UserError(
                f"ranks {first} and {other} would use the same GPU: start as many ranks on a machine as it has GPUs "
                "(--nproc_per_node), or show each rank a GPU of its own (Slurm: --gpus-per-task 1)"
            )


def rendezvous(device: torch.device, rank: int, size: int) -> None:
    """Join the default process group. Raises RunError if the other ranks cannot be reached."""
    try:
        store = _open_store(rank, size)
        if device.type == "cuda" and size > 1:
            check_own_gpus(store, rank, size, device)
        # With device_id NCCL connects the GPUs now, not in the first collective.
        nccl = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**nccl, store=store, rank=rank, world_size=size, timeout=RENDEZVOUS_TIMEOUT)
    except dist.DistError as error:
        where, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).partition("\n")[0][:200]
        raise RunError(
            f"rank {rank} of {size} cannot reach the others at {where} ({reason}): look for the message of a rank that "
            "has ended, or correct the address, or choose a free port"
        ) from None
    world = dist.group.WORLD
    assert world is not None
    world.set_timeout(COLLECTIVE_TIMEOUT)
    store.set_timeout(COLLECTIVE_TIMEOUT)  # NCCL's subgroups use it after models have been loaded


def shutdown() -> None:
    """End gloo's threads while Python still runs. A thread that needs the interpreter later aborts the process.

    NCCL's threads end without this, and would wait here for ranks that have failed. NCCL warns of it, however, and a
    single rank has nobody to wait for.
    """
    if dist.is_initialized() and (dist.get_backend() == "gloo" or dist.get_world_size() == 1):
        dist.destroy_process_group()
