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

    Of several GPUs, the current one gets its random numbers back: it is the one that the program uses. A process group
    of one rank that the run created ends, so that the caller can create another. The group of ranks that a launcher
    started stays for the next run, because its ranks cannot meet again at the same address. In the run, gradients are
    on, even where a notebook has turned them off.
    """
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    cuda, cudnn, deterministic = torch.backends.cuda, torch.backends.cudnn, torch.get_deterministic_debug_mode()
    with contextlib.ExitStack() as stack:  # undoes what comes last first
        stack.callback(torch.cuda.empty_cache)
        stack.callback(gc.collect)  # engines are reference cycles
        stack.enter_context(torch.inference_mode(False))  # turns gradients on, too
        stack.callback(setattr, sys, "excepthook", sys.excepthook)  # each process group of torch wraps it
        stack.callback(os.environ.update, dict(os.environ))
        stack.callback(os.environ.clear)
        if not dist.is_initialized():
            stack.callback(end_process_group)
        for gpu in gpus:
            stack.enter_context(torch.cuda.device(gpu))
        stack.enter_context(torch.random.fork_rng(gpus))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.use_deterministic_algorithms, deterministic > 0, warn_only=deterministic == 1)
        stack.callback(setattr, cuda.matmul, "allow_tf32", cuda.matmul.allow_tf32)
        stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        stack.callback(cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled())
        yield


def end_process_group() -> None:
    """End the default process group if it has one rank. DeepSpeed, if it was imported, has to forget it, too."""
    if not dist.is_initialized() or dist.get_world_size() > 1:
        return
    comm = sys.modules.get("deepspeed.comm", dist)
    (comm if comm.is_initialized() else dist).destroy_process_group()
