"""What stands in for torch.Tensor's methods, torch.cuda and torch.accelerator while a VirtualCuda is entered."""

from __future__ import annotations

import contextlib
import os
import threading
import types
from collections import Counter
from typing import Any

import torch

from helpers.virtual_cuda import CPU, CUDA, VirtualCuda, device_of_tensor
from helpers.virtual_cuda_graph import VirtualGraph

ORIGINAL = {name: getattr(torch.Tensor, name) for name in ("to", "tolist", "numpy", "type", "new_tensor")}
FACTORIES = ("tensor", "as_tensor", "asarray")


def replacements(gpu: VirtualCuda) -> list[tuple[Any, dict[str, Any]]]:
    """Objects, and the attributes that they get."""
    methods = TensorMethods(gpu)
    names = [name for name in vars(TensorMethods) if not name.startswith("_")]
    tensor: dict[str, Any] = {name: _as_method(getattr(methods, name)) for name in names}
    tensor["device"] = property(gpu.device_of)
    tensor["is_cuda"] = property(gpu.holds)
    tensor["is_cpu"] = property(lambda t: gpu.device_of(t).type == "cpu")
    factories = {name: _factory(gpu, getattr(torch, name)) for name in FACTORIES}
    return [
        (torch.Tensor, tensor),
        (torch, factories),
        (torch.nn.functional, {"scaled_dot_product_attention": _attention(gpu)}),
        (torch.cuda, cuda_module(gpu)),
        (torch.accelerator, accelerator(gpu)),
    ]


def is_cuda(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


def _as_method(bound):
    return lambda tensor, *args, **kwargs: bound(tensor, *args, **kwargs)


class TensorMethods:
    """Methods of torch.Tensor that move tensors, or read them on the host."""

    def __init__(self, gpu: VirtualCuda) -> None:
        self._gpu = gpu

    def to(self, tensor, *args, **kwargs):
        gpu, original = self._gpu, ORIGINAL["to"]
        if threading.get_ident() != gpu.thread:  # transformers reads weights in threads of its own
            return original(tensor, *args, **kwargs)
        target = kwargs.get("device", next(filter(_names_device, args), None))
        if target is None or str(target) == "meta":
            return original(tensor, *args, **kwargs)
        device = target.device if isinstance(target, torch.Tensor) else target
        on_gpu = isinstance(device, int) or is_cuda(device)
        args = [CPU if a is target else a for a in args]
        if isinstance(target, torch.Tensor):
            args.insert(1, target.dtype)
        kwargs = {key: CPU if key == "device" else value for key, value in kwargs.items()}
        with gpu.creates(on_gpu):
            if on_gpu == gpu.holds(tensor) or device_of_tensor(tensor).type == "meta":
                return original(tensor, *args, **kwargs)
            gpu.moved(tensor, on_gpu, not kwargs.get("non_blocking"))
            return original(tensor, *args, **{**kwargs, "copy": True})

    def cuda(self, tensor, device=None, non_blocking=False, **_):
        return self.to(tensor, CUDA, non_blocking=non_blocking)

    def cpu(self, tensor, **_):
        return self.to(tensor, CPU)

    def tolist(self, tensor):
        if self._gpu.holds(tensor):
            self._gpu.wait("tolist")
        return ORIGINAL["tolist"](tensor)

    def numpy(self, tensor, *args, **kwargs):
        if self._gpu.holds(tensor):
            raise TypeError(f"can't convert cuda:0 device type tensor to numpy at {self._gpu.caller()}")
        return ORIGINAL["numpy"](tensor, *args, **kwargs)

    def pin_memory(self, tensor, *_):
        if self._gpu.holds(tensor):
            raise RuntimeError(f"cannot pin: only dense CPU tensors can be pinned, at {self._gpu.caller()}")
        pinned = tensor.clone()
        storage = pinned.untyped_storage()
        self._gpu.pinned[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage)
        return pinned

    def is_pinned(self, tensor, *_):
        return tensor.untyped_storage()._cdata in self._gpu.pinned

    def record_stream(self, tensor, stream):
        return None

    def get_device(self, tensor):
        return 0 if self._gpu.holds(tensor) else -1

    def type(self, tensor, dtype=None, *args, **kwargs):
        if dtype is None and self._gpu.holds(tensor):
            return ORIGINAL["type"](tensor).replace("torch.", "torch.cuda.", 1)
        return ORIGINAL["type"](tensor, *([] if dtype is None else [dtype]), *args, **kwargs)

    def new_tensor(self, tensor, data, device=None, **kwargs):
        on_gpu = self._gpu.holds(tensor) if device is None else is_cuda(device)
        factory = _factory(self._gpu, lambda *a, **k: ORIGINAL["new_tensor"](tensor, *a, **k))
        return factory(data, device=CUDA if on_gpu else CPU, **kwargs)


def _names_device(argument: object) -> bool:
    return isinstance(argument, (str, int, torch.device, torch.Tensor)) and not isinstance(argument, bool)


def _factory(gpu: VirtualCuda, function):
    """One of torch's functions from Python data."""

    def create(data, *args, device=None, **kwargs):
        if not is_cuda(device):
            return function(data, *args, device=None if device is None else torch.device(device), **kwargs)
        if isinstance(data, torch.Tensor) and gpu.holds(data):
            return function(data, *args, **kwargs)
        tensor = function(data, *args, **kwargs)
        gpu.moved(tensor, to_gpu=True)
        return gpu.put(tensor.clone())

    return create


def _attention(gpu: VirtualCuda):
    """Attention whose own causal mask is where the queries are: it asks for the physical device of the queries."""
    function = torch.nn.functional.scaled_dot_product_attention

    def attention(query, *args, **kwargs):
        with gpu.creates(True) if gpu.holds(query) else contextlib.nullcontext():
            return function(query, *args, **kwargs)

    return attention


class _Nothing:
    """A stream, an event, a context manager or a module: it accepts every call and does nothing."""

    def __init__(self, *_, **__) -> None: ...
    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: 0

    def __call__(self, *_, **__):
        return self


def _constant(value):
    return lambda *_, **__: value


def cuda_module(gpu: VirtualCuda) -> dict[str, Any]:
    """Attributes of torch.cuda. Each process sees one GPU, another one than the other processes."""
    total = gpu.limit or 24 << 30
    properties = types.SimpleNamespace(
        name="virtual", total_memory=total, major=8, minor=6, multi_processor_count=82, uuid=f"virtual-{os.getpid()}",
    )  # fmt: skip
    values = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "init": None,
        "_lazy_init": None, "empty_cache": None, "ipc_collect": None, "reset_peak_memory_stats": None,
        "manual_seed": None, "manual_seed_all": None, "set_rng_state": None, "is_current_stream_capturing": False,
        "get_device_name": "virtual", "get_device_properties": properties, "get_device_capability": (8, 6),
        "memory_stats": Counter(), "is_bf16_supported": gpu.bf16, "is_tf32_supported": True,
    }  # fmt: skip
    measured = {
        "synchronize": lambda *_: gpu.wait("synchronize"),
        "memory_allocated": lambda *_: gpu.held,
        "max_memory_allocated": lambda *_: gpu.peak,
        "memory_reserved": lambda *_: gpu.held,
        "max_memory_reserved": lambda *_: gpu.peak,
        "mem_get_info": lambda *_: (total - gpu.held, total),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_device": _set_device,
    }
    nothing = {name: _Nothing() for name in ("nvtx", "default_stream", "current_stream", "stream")}
    classes = dict.fromkeys(("device", "Stream", "Event"), _Nothing)
    graph = {"CUDAGraph": type("CUDAGraph", (VirtualGraph,), {"gpu": gpu})}
    return {name: _constant(value) for name, value in values.items()} | measured | nothing | classes | graph


def accelerator(gpu: VirtualCuda) -> dict[str, Any]:
    """Attributes of torch.accelerator."""
    stream = types.SimpleNamespace(is_capturing=lambda: False)
    values = {
        "is_available": True, "device_count": 1, "current_device_index": 0, "current_stream": stream,
        "current_accelerator": torch.device("cuda"),
    }  # fmt: skip
    functions = {name: _constant(value) for name, value in values.items()}
    return functions | {"synchronize": lambda *_: gpu.wait("synchronize")}


def _set_device(device) -> None:
    if device if isinstance(device, int) else torch.device(device).index:
        raise RuntimeError("CUDA error: invalid device ordinal")
