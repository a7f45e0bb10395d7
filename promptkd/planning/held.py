"""What a rank holds throughout a run, and what building the engines needs. Letters are those of memory.py."""

from __future__ import annotations

from collections import Counter

from promptkd.planning.setting import Engine, Setting

# Resident in a rank of train.py that has taken two steps with models of next to no size: Python, torch, transformers,
# DeepSpeed and matplotlib. 0.53 GB was noted when the plan was made;
# `benchmarks/plan.py --settings framework` measures it, and found 0.47 GB later on a machine of the same kind.
CPU_FRAMEWORK = 0.53e9
# CUDA context, cuBLAS and NCCL buffers of a process: NVIDIA's usual order of magnitude, not measured here.
GPU_FRAMEWORK = 1.5e9
# A device is full before its last byte: what the allocator loses to fragments.
GPU_HEADROOM = 0.95

Parts = Counter  # name -> bytes


def held_by(engine: Engine, name: str, setting: Setting) -> tuple[Parts, Parts]:
    """What an engine holds throughout, on its device and in the host's memory (ZeRO: Rajbhandari et al., 2020)."""
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
        optimizer["optimizer states"] = 8 * trained  # Adam's two moments; the weights are their own masters
        return device, host
    # stage_1_and_2.py clones the master weights in fp32 too, where they equal the weights.
    optimizer["master weights"] = 4 * share
    optimizer["optimizer states"] = 8 * share
    if engine.stage == 3:
        optimizer["gradients"] = b * share  # grad_partitions_flat_buffer
        bucket = min(engine.bucket, trained) if setting.hardware.cpu else engine.bucket
        device["gradient bucket"] = b * bucket  # allocated whole; on a CPU pages that are never touched do not count
        if engine.offload_optimizer:
            host["gradients in fp32"] = 4 * share
    elif engine.offload_optimizer:
        largest = max(engine.shape.head, engine.shape.layer_matrices) if not engine.prompt else trained
        host["gradients in fp32"] = 4 * share
        host["offload buffers"] = b * (share + min(largest, trained))  # weights on their way back, one gradient
        device["offload buffers"] = b * min(largest, trained)
        if setting.micro_batches() > 1:
            host["gradients"] = b * share  # accumulated between micro-batches
    return device, host


def building(engine: Engine, setting: Setting) -> float:
    """The most that loading a model and starting its engine needs on the device, beyond what is there before."""
    b, ranks, count = engine.size, setting.data_ranks(engine), engine.parameters
    share = engine.trained / ranks
    masters = (
        0 if engine.offload_optimizer and not setting.hardware.cpu else 8 * share
    )  # and gradients of zeros, dropped
    if engine.stage == 3:
        # lazy_weights.py shares out tensor by tensor; a student was read into the machine's memory before.
        whole = b * count if setting.hardware.cpu and not engine.prompt else b * engine.shape.head
        return whole + b * count / ranks + masters
    if not engine.trained or engine.stage == 0:
        return engine.weights
    return engine.weights + b * engine.trained + masters  # ZeRO 1 and 2 copy what is trained into one flat block
