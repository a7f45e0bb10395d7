"""Leave a process as it was before a run in it, for programs and notebooks that continue afterwards."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist


@contextlib.contextmanager
def restored_process_state() -> Iterator[None]:
    """Restore the environment, random numbers and torch's settings after a run, and free its memory.

    A process group of one rank that the run created ends, so that the caller can create another. The group of ranks
    that a launcher started stays for the next run, because its ranks cannot meet again at the same address.
    """
    environment = dict(os.environ)
    own_group = not dist.is_initialized()
    python, numpy = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
        if device is not None:
            torch.cuda.set_device(device)
        if own_group and dist.is_initialized() and dist.get_world_size() == 1:
            end_process_group()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        gc.collect()  # engines are reference cycles
        torch.cuda.empty_cache()


def end_process_group() -> None:
    """End the default process group. DeepSpeed, if it was imported, has to forget it, too."""
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()
