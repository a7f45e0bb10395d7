"""Run CUDA code paths on a machine without a GPU.

    with VirtualCuda() as gpu, gpu.phase("step"):
        ...                             # device="cuda", .to("cuda") and .cuda() give tensors on cuda:0
    assert gpu.count("waits", "step") <= 40

Tensors stay ordinary CPU tensors. The device records by storage which of them are on cuda:0, so views, `.data`,
modules, hooks and optimizers need no support of their own. A `TorchDispatchMode` sees every operator of forward and
backward. It raises RuntimeError where the operands of an operator are on two devices and CUDA would refuse them. It
counts, for each phase, what a budget can be put on:

* launches: operators that are not views, about one kernel each;
* waits: operators that stop the host until the GPU is done, with the line of the project that causes them. A blocking
  copy from the host is one (`memcpy_and_sync` in ATen/native/cuda/Copy.cu);
* collectives, and the most bytes held.

The device cannot see kernels, streams, NCCL, fragmentation or the workspaces of kernels. It sees operators of one
thread only. The gradient of a CPU leaf that went through `.to("cuda")` counts as on the GPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.virtual_cuda_graph import VirtualGraph

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Operators whose result has a size or value that the host needs. Indexing by a mask is another one.
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "multinomial", "bincount",
}  # fmt: skip
MOVES = {"copy_", "_to_copy", "set_", "lift_fresh"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Operators without a kernel of their own.
FREE = {
    "detach", "_local_scalar_dense", "lift_fresh", "set_", "alias", "empty", "empty_like", "new_empty",
    "empty_strided", "resize_",
}  # fmt: skip
# Operators without a deterministic CUDA implementation (torch.use_deterministic_algorithms).
NONDETERMINISTIC = {"nll_loss2d_forward", "put_", "histc", "median"}
KINDS = ("launches", "waits", "collectives")

device_of_tensor = torch._C.TensorBase.device.__get__


class VirtualCuda(contextlib.ExitStack):
    """A virtual GPU, present while the object is entered.

    Args:
        root: Folder of the code whose lines are reported.
        memory: Bytes of the GPU. `torch.OutOfMemoryError` is raised beyond them. None sets no limit.
        bf16: Whether the GPU supports bfloat16.
    """

    def __init__(self, root: str | os.PathLike = ".", memory: int | None = None, bf16: bool = True) -> None:
        super().__init__()
        self.root, self.limit, self.bf16 = os.path.abspath(root) + "/", memory, bf16
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}  # address -> (storage, bytes as CUDA allots them)
        self.pinned: dict[int, StorageWeakRef] = {}
        self.held, self.peak, self.current = 0, 0, ""
        self.creating = self.leaving = False
        self.counts: Counter = Counter()  # (phase, one of KINDS) -> times
        self.waits: Counter = Counter()  # (phase, kind, line) -> times
        self.operators: Counter = Counter()  # (phase, operator) -> launches
        self.peaks: Counter = Counter()  # phase -> most bytes held
        self.replays: Counter = Counter()  # phase -> replays of CUDA graphs, each of which launches all its operators
        self.capturing: VirtualGraph | None = None

    def __enter__(self) -> VirtualCuda:
        from helpers.virtual_cuda_stubs import replacements

        super().__enter__()
        self.thread = threading.get_ident()
        for owner, names in replacements(self):
            for name, value in names.items():
                self.enter_context(mock.patch.object(owner, name, value, create=True))
        self.enter_context(_Operators(self))
        return self

    def count(self, kind: str, phase: str = "") -> int:
        """Launches, waits or collectives of a phase, those of its inner phases included."""
        inside = [
            key for key in self.counts if key[1] == kind and f"{key[0]}/".startswith(f"{phase}/" if phase else "")
        ]
        return sum(self.counts[key] for key in inside)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside under this name. Phases nest: "step/student/backward"."""
        before, self.current = self.current, f"{self.current}/{name}".strip("/")
        try:
            yield
        finally:
            self.current = before

    def summary(self) -> dict[str, dict[str, int]]:
        """Phase -> launches, waits, collectives and peak bytes, as JSON can hold them."""
        names = sorted({phase for phase, _ in self.counts})
        return {
            name: {kind: self.counts[name, kind] for kind in KINDS} | {"peak_bytes": self.peaks[name]} for name in names
        }

    def wait_lines(self) -> list[tuple[int, str, str, str]]:
        """(times, phase, kind, line of the project) of every wait, most frequent first."""
        return [(times, *key) for key, times in self.waits.most_common()]

    def holds(self, tensor: torch.Tensor) -> bool:
        try:
            return tensor.untyped_storage()._cdata in self.storages
        except (NotImplementedError, RuntimeError):  # a sparse tensor has no storage
            return False

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        return CUDA if self.holds(tensor) else device_of_tensor(tensor)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Record a tensor's storage as on the GPU. Raises torch.OutOfMemoryError beyond the limit."""
        if self.holds(tensor) or device_of_tensor(tensor).type == "meta":
            return tensor
        for key in [key for key, (storage, _) in self.storages.items() if storage.expired()]:
            self.held -= self.storages.pop(key)[1]
        storage = tensor.untyped_storage()
        size = (storage.nbytes() + 511) // 512 * 512
        # The weak reference keeps the address from being used by another storage.
        self.storages[storage._cdata] = StorageWeakRef(storage), size
        self.held += size
        self.peak = max(self.peak, self.held)
        self.peaks[self.current] = max(self.peaks[self.current], self.held)
        if self.limit is not None and self.held > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes at {self.caller()}")
        return tensor

    @contextlib.contextmanager
    def creates(self, on_gpu: bool) -> Iterator[None]:
        """Tensors created inside are on the GPU, or are not."""
        before, self.creating, self.leaving = (self.creating, self.leaving), on_gpu, not on_gpu
        try:
            yield
        finally:
            self.creating, self.leaving = before

    def check_devices(self, func, name: str, args, tensors: list[torch.Tensor]) -> None:
        """Raise RuntimeError where CUDA would: a 0-dimensional CPU tensor may join, and indices may be on the CPU."""
        if name in INDEXING:
            for index in (i for i in args[1] if i is not None and not self.holds(i)):
                self.moved(index, to_gpu=True)
            tensors = [t for t in (args[0], *args[2:3]) if isinstance(t, torch.Tensor)]
        wrong = [t for t in tensors if not self.holds(t) and (t.dim() or "_fused_" in name or t is args[0])]
        if wrong and not (name == "cat" and all(t.numel() == 0 for t in wrong)):
            places = [(tuple(t.shape), str(self.device_of(t))) for t in tensors[:8]]
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {places} at {self.caller()}")

    def check_deterministic(self, name: str, args) -> None:
        """Raise RuntimeError as torch.use_deterministic_algorithms makes CUDA do."""
        if not torch.are_deterministic_algorithms_enabled():
            return
        if name in NONDETERMINISTIC or (name in ("cumsum", "cumsum_") and args[0].is_floating_point()):
            raise RuntimeError(f"{name} does not have a deterministic implementation, at {self.caller()}")

    def caller(self) -> str:
        """The innermost line of the project on the stack, and the library's line that it called."""
        frame, below = sys._getframe(1), ""
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(self.root) and "/virtual_" not in name and "/.venv/" not in name:
                return f"{name.removeprefix(self.root)}:{frame.f_lineno}{below}"
            if not below and "/torch/" not in name and "/virtual_" not in name and "<" not in name:
                below = f" via {'/'.join(name.split('/')[-2:])}:{frame.f_lineno}"
            frame = frame.f_back
        return below.removeprefix(" via ")

    def wait(self, kind: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind} at {self.caller()}")
        self.counts[self.current, "waits"] += 1
        self.waits[self.current, kind, self.caller()] += 1

    def moved(self, host: torch.Tensor, to_gpu: bool, blocking: bool = True) -> None:
        """Count a copy between host and GPU as a wait, unless it is asynchronous from pinned memory."""
        if blocking or host.untyped_storage()._cdata not in self.pinned:
            self.wait("copy to GPU" if to_gpu else "copy to CPU")


class _Operators(TorchDispatchMode):
    """Sees every operator, places its results and counts it."""

    def __init__(self, gpu: VirtualCuda) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        gpu, kwargs, name = self.gpu, kwargs or {}, func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [t for t in tensors if gpu.holds(t)]
        if func.namespace == "c10d":
            return self.collective(func, name, args, kwargs, tensors, on_gpu)
        asked = kwargs.get("device")
        if asked is not None and asked.type == "cuda":  # a factory, or a move that C++ code asks for
            if name == "_to_copy" and not on_gpu:
                gpu.moved(args[0], to_gpu=True)
            kwargs = {**kwargs, "device": CPU}
        elif gpu.leaving or not (on_gpu or gpu.creating):
            return func(*args, **kwargs)
        if on_gpu and name not in MOVES:
            gpu.check_devices(func, name, args, tensors)
            gpu.check_deterministic(name, args)
        if name == "copy_" and gpu.holds(args[0]) != gpu.holds(args[1]):
            blocking = not (len(args) > 2 and args[2])
            gpu.moved(args[1] if gpu.holds(args[0]) else args[0], gpu.holds(args[0]), blocking)
            return func(*args, **kwargs)
        if gpu.capturing is not None:
            gpu.capturing.keep_written(func, args, kwargs)
        result = func(*args, **kwargs)
        self.record(func, name, args, kwargs)
        if gpu.capturing is not None:
            gpu.capturing.add(func, args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                gpu.put(tensor)
        return result

    def collective(self, func, name: str, args, kwargs, tensors, on_gpu):
        gpu = self.gpu
        if len(on_gpu) != len(tensors) and name != "barrier":
            places = [(tuple(t.shape), str(gpu.device_of(t))) for t in tensors[:8]]
            raise RuntimeError(f"No backend type associated with device type cpu: {func} of {places} at {gpu.caller()}")
        gpu.counts[gpu.current, "collectives"] += 1
        return func(*args, **kwargs)

    def record(self, func, name: str, args, kwargs) -> None:
        gpu = self.gpu
        masks = name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in WAITS or masks or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            gpu.wait(name)
        if not func.is_view and name not in FREE:
            gpu.counts[gpu.current, "launches"] += 1
            gpu.operators[gpu.current, name] += 1
