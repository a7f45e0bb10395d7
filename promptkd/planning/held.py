"""Memory that a rank holds throughout a run, and the peak while its engines are built."""

from __future__ import annotations

from promptkd.planning.setting import Engine, Setting

# Resident memory of a rank of train.py after two steps with tiny models: Python, torch, transformers, DeepSpeed and
# matplotlib. `benchmarks/plan.py --settings framework` measures it and found between 0.47 and 0.53 GB.
CPU_FRAMEWORK = 0.53e9
# CUDA context, cuBLAS and NCCL buffers of a process. This is the usual order of magnitude and was not measured.
GPU_FRAMEWORK = 1.5e9
# Share of a GPU's memory that can be used. The rest is lost to fragmentation.
GPU_HEADROOM = 0.95


class Parts(dict[str, float]):
    """What memory is used for: name -> bytes. A missing name counts as 0."""

    def __missing__(self, name: str) -> float:
        return 0.0

    def total(self) -> float:
        return sum(self.values())

    def add(self, other: Parts) -> None:
        """Add the bytes of another phase or model name by name."""
        for name, size in other.items():
            self[name] += size

    def maximum(self, other: Parts) -> Parts:
        """Return the larger size of each name."""
        return Parts({name: max(self[name], other[name]) for name in {**self, **other}})


def held_by(engine: Engine, name: str, setting: Setting) -> tuple[Parts, Parts]:
    """Compute what an engine holds throughout on its device and in main memory (ZeRO: Rajbhandari et al., 2020)."""
    device, host, b = Parts(), Parts(), engine.size
    ranks = setting.data_ranks(engine)
    trained, share = engine.trained, engine.trained / ranks
    sharded = engine.stage == 3
    weights = engine.weights / (ranks if sharded else 1)
    (host if engine.offload_parameters else device)[f"weights of the {name}"] = weights
    if not trained:
        return device, host
    optimizer = host if engine.offload_optimizer else device
    if engine.stage == 0 and engine.kind == "fp32":
        optimizer["optimizer states"] = 8 * trained  # Adam's two moments. The weights are the master weights.
        return device, host
    # DeepSpeed's stage_1_and_2.py clones the master weights in fp32 too, although they equal the weights.
    optimizer["master weights"] = 4 * share
    optimizer["optimizer states"] = 8 * share
    if engine.stage == 3:
        optimizer["gradients"] = b * share  # grad_partitions_flat_buffer
        device["gradient bucket"] = b * engine.bucket
        if engine.offload_optimizer:
            host["gradients in fp32"] = 4 * share
    elif engine.offload_optimizer:
        largest = max(engine.shape.head, engine.shape.layer_matrices) if not engine.prompt else trained
        host["gradients in fp32"] = 4 * share
        host["offload buffers"] = b * (share + min(largest, trained))  # updated weights and one gradient
        device["offload buffers"] = b * min(largest, trained)
        if setting.micro_batches() > 1:
            host["gradients"] = b * share  # accumulated between micro-batches
    return device, host


def free_on_device(setting: Setting) -> float | None:
    """Compute what a GPU has free beside what is held throughout the run. None on a CPU."""
    if setting.hardware.cpu:
        return None
    engines = [("student", setting.student), ("teacher", setting.teacher)]
    held = sum(held_by(engine, name, setting)[0].total() for name, engine in engines if engine)
    return setting.hardware.memory * GPU_HEADROOM - GPU_FRAMEWORK - held


def building(engine: Engine, setting: Setting) -> float:
    """Compute the peak on the device while a model is loaded and its engine built, beyond what was held before."""
    b, ranks, count = engine.size, setting.data_ranks(engine), engine.parameters
    share = engine.trained / ranks
    offloaded = engine.offload_optimizer and not setting.hardware.cpu
    masters = 0 if offloaded else 8 * share  # and temporary gradients of zeros
    if engine.stage == 3:
        # models/deferred.py partitions a teacher tensor by tensor. A student is first read into main memory.
        complete = b * count if setting.hardware.cpu and not engine.prompt else b * engine.shape.head
        return complete + b * count / ranks + masters
    if not engine.trained or engine.stage == 0:
        return engine.weights
    return engine.weights + b * engine.trained + masters  # ZeRO 1 and 2 copy the trained weights into one block
