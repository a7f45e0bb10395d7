"""A decoding step as a CUDA graph, which launches all of the step's kernels at once.

Python and kernel launches take longer than the kernels of a decoding step: the graph is several times faster.
A step can be captured if its shapes and addresses stay, and if nothing in it waits for the device.

These batches are not captured, and run the same step eagerly: those on a CPU; of tensor-parallel ranks, which exchange
tokens; of models without an explicit mask (sliding windows shorter than the sequences, linear attention, ALiBi,
quantized weights); of mixtures of experts and of rotary positions that depend on the length, which read the device;
with deterministic algorithms, whose indexed writes do so too. PROMPTKD_CUDA_GRAPHS=off turns capturing off.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

import torch

from promptkd.errors import UserError, is_out_of_memory
from promptkd.generation.cached_model import CachedModel
from promptkd.models.tensor_parallel import group_of

SWITCH = "PROMPTKD_CUDA_GRAPHS"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def can_be_captured(models: Sequence[CachedModel]) -> bool:
    """Whether a decoding step of these models is captured on their device; see the module's description."""
    if models[0].model.device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return False
    return os.environ.get(SWITCH) != "off" and all(map(_has_fixed_step, models))


def _has_fixed_step(cached: CachedModel) -> bool:
    config = cached.model.config.get_text_config()
    rotary = str(getattr(config, "rope_parameters", None))
    reads_device = "dynamic" in rotary or "longrope" in rotary or any(getattr(config, name, 0) for name in _EXPERTS)
    return cached.mask is not None and group_of(cached.model) is None and not reads_device


class CapturedStep:
    """Runs a step eagerly the first time, captures it the second time, and replays the graph from then on.

    The first run loads kernels and fills libraries' caches, which is not allowed during capture.
    """

    # Graphs share the memory of their intermediate results. The latest graph keeps it for the next one.
    _latest: torch.cuda.CUDAGraph | None = None
    _stream: torch.cuda.Stream | None = None

    def __init__(self) -> None:
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Callable[[], None]) -> None:
        """Run a step, the same one in each call. It uses only tensors that stay, and never waits for the device."""
        if not self._warm:
            self._warm = True
            step()
            return
        if self._graph is None:
            self._graph = self._capture(step)
        self._graph.replay()

    @classmethod
    def _capture(cls, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture the step. `torch.cuda.graph` is not used, because it returns all unused memory to the driver."""
        if cls._stream is None:
            cls._stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        pool = None if cls._latest is None else cls._latest.pool()
        cls._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(cls._stream):
            # Other threads, such as NCCL's watchdog, may call CUDA meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                step()
            except RuntimeError as error:
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                if is_out_of_memory(error):
                    raise
                raise UserError(f"a decoding step cannot be captured ({error}): set {SWITCH}=off") from error
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(cls._stream)
        cls._latest = graph
        return graph
