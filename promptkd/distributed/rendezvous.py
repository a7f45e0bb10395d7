"""How ranks find each other and leave together."""

from __future__ import annotations

import datetime
import os
import time
import uuid

import torch
import torch.distributed as dist

from promptkd.errors import RunError, UserError

# Within which ranks that start together have to find each other: imports lie before, and test sets, but no model.
RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=5)
# The longest that a rank waits for others in a collective: one of them may be writing a checkpoint.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


def environment_number(name: str, default: int = 0) -> int:
    """A whole number that a launcher has set in the environment. Raises UserError when it is none."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name}={text[:32]!r} in the environment is no number: unset it, or start with torchrun")
    return int(text)


def tensor_parallel_groups(processes: int, size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This process' `size` neighbours, and the processes that have its place among theirs. All processes call it."""
    blocks = [list(range(start, start + size)) for start in range(0, processes, size)]
    places = [list(column) for column in zip(*blocks)]
    return tuple(dist.new_subgroups_by_enumeration(ranks, timeout=COLLECTIVE_TIMEOUT)[0] for ranks in (blocks, places))


def _open_store(rank: int, size: int) -> dist.Store:
    """Where ranks leave each other their addresses: torchrun's store, or one that the first rank opens itself."""
    if size == 1:
        return dist.HashStore()  # no port: it talks to nobody
    inherited = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = os.environ["MASTER_ADDR"], environment_number("MASTER_PORT")
    store = dist.TCPStore(*address, size, is_master=rank == 0 and not inherited, timeout=RENDEZVOUS_TIMEOUT)
    return fresh_prefix_store(store, rank, size) if inherited else store


def fresh_prefix_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of `store` that these ranks alone write to, none of an earlier start.

    torchrun keeps one store over its restarts, and torch (2.13) leaves the addresses of dead ranks in it under the
    names that the new ones use, so that some connect to nobody (pytorch issue 135712). Starts cannot be told apart by
    number: of several machines each counts those of its own failures (TORCHELASTIC_RESTART_COUNT). So each rank asks
    under a name that nobody had before, the first one answers all, and goes on when those who have its answer are all.
    Raises torch's DistStoreError when a rank has not come within MEET.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"promptkd/asks/{rank}", mine)
        part = store.get(f"promptkd/answer/{mine}").decode()
        store.set(f"{part}/has/{rank}", "")
        return dist.PrefixStore(part, store)
    others, end = range(1, size), time.monotonic() + RENDEZVOUS_TIMEOUT.total_seconds()
    while not store.check([f"{mine}/has/{other}" for other in others]):
        for other in others:
            if store.check([f"promptkd/asks/{other}"]):  # by this rank, or by one of an earlier start: no matter
                store.set(f"promptkd/answer/{store.get(f'promptkd/asks/{other}').decode()}", mine)
        if time.monotonic() > end:
            raise dist.DistStoreError(f"some did not come within {RENDEZVOUS_TIMEOUT.total_seconds():.0f} s")
        time.sleep(0.02)
    return dist.PrefixStore(mine, store)


def check_own_gpus(store: dist.Store, rank: int, size: int, device: torch.device) -> None:
    """Raise UserError where two ranks would use the same GPU. NCCL refuses that later, in many lines."""
    store.set(f"promptkd/gpu/{rank}", str(torch.cuda.get_device_properties(device).uuid))
    ranks: dict[bytes, int] = {}
    for other in range(size):
        first = ranks.setdefault(store.get(f"promptkd/gpu/{other}"), other)
        if first != other:
            raise UserError(
                f"ranks {first} and {other} would use the same GPU: start as many ranks on a machine as it has GPUs "
                "(--nproc_per_node), or show each rank a GPU of its own (Slurm: --gpus-per-task 1)"
            )


def _rendezvous(device: torch.device, rank: int, size: int) -> None:
    try:
        store = _open_store(rank, size)
        if device.type == "cuda" and size > 1:
            check_own_gpus(store, rank, size, device)
        # With device_id NCCL connects the ranks now, to their own GPUs, and not in the first collective.
        nccl = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**nccl, store=store, rank=rank, world_size=size, timeout=RENDEZVOUS_TIMEOUT)
    except dist.DistError as error:
        where, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).partition("\n")[0][:200]
        raise RunError(
            f"rank {rank} of {size} cannot meet the others at {where} ({reason}): a rank has ended, and said why, or "
            "the address is wrong, or the port is taken"
        ) from None
    world = dist.group.WORLD
    assert world is not None
    world.set_timeout(COLLECTIVE_TIMEOUT)
    store.set_timeout(COLLECTIVE_TIMEOUT)  # NCCL's subgroups connect through it when models have been loaded


def _shutdown() -> None:
    """End the groups' threads while Python still runs: one that wants the interpreter afterwards aborts the process.

    NCCL's end by themselves, and would wait here for ranks that have failed.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
