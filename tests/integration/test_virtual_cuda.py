"""The virtual device itself: it refuses what CUDA refuses, and counts launches, waits and bytes."""

import pytest
import torch
from helpers.virtual_cuda import VirtualCuda

pytestmark = pytest.mark.cpu


@pytest.fixture
def gpu():
    with VirtualCuda() as device:
        yield device


@pytest.mark.parametrize(
    "operation",
    [
        lambda a, b: a + b,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: a.view(1, 3) @ b.view(3, 1),
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: torch.nn.functional.linear(a, b.view(1, 3)),
        lambda a, b: b.add_(a),
    ],
)
def test_virtual_cuda_mixed_operands_raise(gpu, operation):
    with pytest.raises(RuntimeError, match="same device"):
        operation(torch.zeros(3, device="cuda"), torch.ones(3))


def test_virtual_cuda_scalar_from_cpu_joins(gpu):
    assert (torch.ones(3, device="cuda") * torch.tensor(2.0)).device.type == "cuda"


def test_virtual_cuda_places_views_modules_and_gradients(gpu):
    layer = torch.nn.Linear(3, 2).to("cuda")
    inputs = torch.ones(2, 3, device="cuda")
    layer(inputs).sum().backward()
    on_gpu = [inputs[0], inputs.t(), layer.weight, layer.weight.data, layer.weight.grad, inputs.new_zeros(3)]
    assert {str(tensor.device) for tensor in on_gpu} == {"cuda:0"}
    assert layer.cpu().weight.device.type == "cpu"


def test_virtual_cuda_fused_optimizer_needs_step_on_gpu(gpu):
    layer = torch.nn.Linear(3, 3).to("cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.ones(2, 3, device="cuda")).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["step"].device.type == "cuda"
    optimizer.state[layer.weight]["step"] = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="same device"):
        optimizer.step()


def test_virtual_cuda_counts_waits_and_launches_by_phase(gpu):
    with gpu.phase("loop"):
        values = torch.ones(4, device="cuda")
        for _ in range(3):
            values = values * 2
            with gpu.phase("read"):
                float(values[0])
    assert gpu.count("waits", "loop") == gpu.count("waits", "loop/read") == 3
    assert gpu.operators["loop", "mul"] == 3 and gpu.count("waits", "loo") == 0
    times, phase, kind, line = gpu.wait_lines()[0]
    assert (times, phase, kind) == (3, "loop/read", "_local_scalar_dense") and "test_virtual_cuda.py:" in line
    assert gpu.summary()["loop"]["peak_bytes"] >= 512


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: bool((t > 0).all()),
        lambda t: torch.tensor([1.0], device="cuda"),
        lambda t: torch.ones(3).to("cuda"),
        lambda t: t.copy_(torch.ones(4)),
    ],
)
def test_virtual_cuda_counts_one_wait(gpu, wait):
    values = torch.ones(4, device="cuda")
    before = gpu.count("waits")
    wait(values)
    assert gpu.count("waits") == before + 1


def test_virtual_cuda_pinned_asynchronous_copy_is_no_wait(gpu):
    pinned = torch.ones(4).pin_memory()
    pinned.to("cuda", non_blocking=True)
    assert gpu.count("waits") == 0


def test_virtual_cuda_numpy_raises_and_ends_with_context():
    with VirtualCuda():
        values = torch.ones(4, device="cuda")
        with pytest.raises(TypeError, match="cuda:0"):
            values.numpy()
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        del values
    assert not torch.cuda.is_available() and torch.ones(1).device.type == "cpu"


def test_virtual_cuda_memory_is_counted_and_limited():
    with VirtualCuda(memory=1 << 20) as gpu:
        held = torch.empty(1000, device="cuda")
        assert gpu.held == 4096  # 4000 bytes in blocks of 512
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.empty(1 << 20, device="cuda")
        del held
        assert torch.cuda.max_memory_allocated() > 1 << 20


def test_virtual_cuda_deterministic_algorithms_raise(gpu):
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.ones(4, device="cuda").long().cumsum(-1).tolist() == [1, 2, 3, 4]
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.ones(4, device="cuda").cumsum(-1)
    finally:
        torch.use_deterministic_algorithms(False)
