"""Compute the memory of one rank, in bytes: what it holds throughout, and what each phase of a step adds.

In the formulas `b` is the bytes of a number in an engine's precision (4 in fp32, else 2). A factor of 4 is the bytes of
a float32. `benchmarks/plan.py` compares the results with measured runs on a CPU. Only two constants are fitted
(held.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from promptkd.planning.decoding import decoding, decoding_rows, forward_only
from promptkd.planning.held import CPU_FRAMEWORK, GPU_FRAMEWORK, Parts, building, free_on_device, held_by
from promptkd.planning.setting import Engine, Setting
from promptkd.utils.memory import loss_bytes, positions_per_chunk

PREFETCH = 50_000_000  # elements: DeepSpeed's stage3_prefetch_bucket_size

WORKING = ("activations", "logits", "key-value cache", "states")


@dataclass(frozen=True)
class Memory:
    """The memory of one rank."""

    cpu: bool
    framework: float  # outside of torch's tensors
    held: Parts  # throughout the run
    phases: dict[str, Parts]  # what each phase adds
    start: float  # peak while the engines are built
    host: Parts  # offloaded to main memory

    def of_phase(self, name: str) -> float:
        """Return everything that is held during a phase."""
        return self.framework + self.held.total() + self.phases[name].total()

    @property
    def peak(self) -> float:
        """Peak memory: allocated on a GPU, resident on a CPU.

        A GPU's allocator reuses the memory of earlier phases, so the largest phase counts. On a CPU glibc keeps what is
        freed (utils/memory.py), in blocks that are too small for a gradient buffer. There the largest size of each
        kind counts, even if the kinds are not used at the same time. Only the WORKING kinds share their memory.
        """
        if not self.cpu:
            return max(self.start, *map(self.of_phase, self.phases))
        working = max(sum(parts[name] for name in WORKING) for parts in self.phases.values())
        kinds = {name for parts in self.phases.values() for name in parts if name not in WORKING}
        blocks = sum(max(parts[name] for parts in self.phases.values()) for name in kinds)
        return max(self.start, self.framework + self.held.total() + working + blocks)


def memory_of(setting: Setting) -> Memory:
    """Compute the memory of one rank of a run."""
    held, host = Parts(), Parts()
    engines = {"student": setting.student, "teacher": setting.teacher}
    start = 0.0
    framework = CPU_FRAMEWORK if setting.hardware.cpu else GPU_FRAMEWORK
    for name, engine in engines.items():
        if engine is None:
            continue
        before = held.total()
        device, offloaded = held_by(engine, name, setting)
        held.add(device)
        if setting.hardware.cpu:
            held.add(offloaded)  # the device's memory is main memory
        else:
            host.add(offloaded)
        start = max(start, framework + before + building(engine, setting))
    phases = {"student": student_phase(setting), "update": update_phase(setting.student, setting)}
    if setting.teacher and setting.teacher.prompt:
        phases = {"prompt": prompt_phase(setting, setting.teacher), **phases}
    if setting.answering:
        phases = {"rollout": rollout_phase(setting), **phases}
    if setting.keeps_states:
        # The student's hidden states are kept from the rollout to the end of the step (methods/promptkd.py).
        kept = setting.rows * setting.max_new * setting.student.shape.width * setting.student.size
        for parts in phases.values():
            parts["states"] += kept
    if setting.dev_rows:
        phases["evaluation"] = evaluation_phase(setting)
    return Memory(setting.hardware.cpu, framework, held, phases, start, host)


def activations(engine: Engine, tokens: int, rows: int, cpu: bool) -> float:
    """Compute the activations that the backward pass needs, and its temporary gradients.

    Counted in transformers' modules with sdpa attention, which keeps no attention matrix. A product saves its input
    only if its weight is trained, so a frozen teacher with a soft prompt keeps about half.

    Args:
        engine: The model.
        tokens: Tokens of the forward pass, padding included.
        rows: Sequences of the forward pass.
        cpu: Whether it runs on a CPU.
    """
    layer = _layer(engine, tokens, rows, cpu)
    backward = engine.size * tokens * (2 * engine.shape.inner / engine.tensor + 2 * engine.shape.width)
    ends = 3 * engine.size * tokens * engine.shape.width  # embeddings' sum, last norm and its input
    if engine.checkpointing:  # Each layer keeps its input. One layer is recomputed at a time.
        return engine.shape.layers * engine.size * tokens * engine.shape.width + layer + backward + ends
    return engine.shape.layers * layer + backward + ends


def _layer(engine: Engine, tokens: int, rows: int, cpu: bool) -> float:
    shape, b, trains = engine.shape, engine.size, not (engine.prompt or engine.frozen)
    cut = engine.tensor
    attention = (2 * shape.queries + 2 * shape.keys) / cut  # queries, keys, values, and the attention's output
    if shape.gated:
        inner = (4 if trains else 3) * shape.inner / cut  # gate, its activation, up; their product for trained weights
        norms = (4 if trains else 0) * shape.width  # two norms: before and after their weight
        return tokens * (b * (attention + inner + norms) + 2 * 4 * shape.width)  # RMS norms keep their input in fp32
    inner = shape.inner / cut * (2 if trains and not shape.family.relu else 1)  # a ReLU saves its result only
    width = (4 if trains else 2) * shape.width  # residual stream before each norm, and the norms' output
    dropout = 0.0
    if trains and shape.dropout:
        dropout = 2 * shape.width * (b if cpu else 1)  # a mask for each residual
        if cpu:  # no fused attention with dropout: matrices, masks and noise
            dropout += 3 * b * shape.heads / cut * tokens / rows
    return tokens * (b * (attention + inner + width) + dropout)


def logits(setting: Setting, engine: Engine, references: int, tokens: int, trained: bool, beside: float = 0) -> float:
    """Compute the loss's logits: one chunk for the model and each reference, and float32 copies of a block.

    Args:
        setting: The run.
        engine: The model that the loss trains.
        references: Number of models that it is compared with.
        tokens: Response tokens of a micro-batch.
        trained: Whether the head is trained.
        beside: Bytes that the phase holds when the loss is computed, beside what is held throughout.
    """
    shape, b, device = engine.shape, engine.size, setting.hardware.device
    free = free_on_device(setting)
    free = None if free is None else free - beside
    chunk = min(positions_per_chunk(shape.vocab, device, free, b, references), tokens)
    needed: float = loss_bytes(chunk, shape.vocab, device, b, references)
    needed += b * tokens * shape.width * (1 + references)  # the hidden states' gradient, the references' states
    if trained:  # the head's gradient in float32, its cast, and a tied embedding's own gradient
        needed += shape.head * (4 + (2 * b if b < 4 else 0) + (b if shape.tied else 0))
    return needed


def rollout_phase(setting: Setting) -> Parts:
    """Student or teacher decode, one after the other. PromptKD keeps the hidden state that predicted each token."""
    parts, engines = Parts(), {"student": setting.student, "teacher": setting.teacher}
    for engine in filter(None, map(engines.get, setting.answering)):
        rows = decoding_rows(setting, engine, setting.rows)
        parts = parts.maximum(decoding(setting, engine, rows))
        if setting.keeps_states:
            parts["states"] = rows * setting.max_new * engine.shape.width * engine.size
    return parts


def evaluation_phase(setting: Setting) -> Parts:
    """The dev loss, then the answers for ROUGE-L and the exposure bias. The largest size of each kind counts."""
    student, teacher, rows = setting.student, setting.teacher, setting.micro_rows(rows=setting.dev_rows)
    loss = Parts({"activations": forward_only(student, rows * (setting.length - 1))})
    loss["logits"] = logits(setting, student, 0, rows * setting.max_new, trained=False)
    parts = loss.maximum(decoding(setting, student, decoding_rows(setting, student, setting.dev_rows)))
    if setting.exposure_rows and teacher:
        parts = parts.maximum(decoding(setting, teacher, decoding_rows(setting, teacher, setting.exposure_rows)))
    return parts


def prompt_phase(setting: Setting, teacher: Engine) -> Parts:
    """The teacher without the prompt (no gradient), then with it. The gradient goes through all layers."""
    rows = setting.micro_rows()
    tokens = rows * (setting.length - 1 + teacher.prompt)
    parts = Parts()
    parts["activations"] = activations(teacher, tokens, rows, setting.hardware.cpu)
    parts["gathered weights"] = gathered(teacher, setting)
    if setting.student.stage == 3:
        parts["gathered weights"] += setting.student.size * setting.student.shape.head
    if teacher.stage in (1, 2):
        parts["gradient bucket"] = teacher.size * teacher.bucket
    tokens = rows * setting.max_new
    parts["logits"] = logits(setting, teacher, 2, tokens, trained=False, beside=parts.total())
    return parts


def student_phase(setting: Setting) -> Parts:
    """The teacher's hidden states (no gradient), then the student's forward and backward passes."""
    student, teacher, rows, cpu = setting.student, setting.teacher, setting.micro_rows(), setting.hardware.cpu
    tokens = rows * (setting.length - 1)
    parts = Parts()
    parts["activations"] = activations(student, tokens, rows, cpu)
    if teacher is not None:
        forward = forward_only(teacher, tokens + rows * teacher.prompt)
        parts["activations"] = max(parts["activations"], forward)
        parts["gathered weights"] = gathered(teacher, setting)
    parts["gathered weights"] += gathered(student, setting)
    parts.add(gradient_blocks(student, setting))
    tokens = rows * setting.max_new
    parts["logits"] = logits(setting, student, 1 if teacher else 0, tokens, trained=True, beside=parts.total())
    return parts


def gathered(engine: Engine, setting: Setting) -> float:
    """ZeRO-3 gathers up to stage3_max_live_parameters. A quantized weight is dequantized for its product."""
    if engine.packed != "none":
        return engine.size * engine.shape.inner * engine.shape.width
    if engine.stage != 3:
        return 0.0
    elements = min(engine.parameters, engine.live)
    if setting.hardware.cpu and setting.data_ranks(engine) > 1:  # gloo gathers into a flat copy (ProcessGroupGloo)
        elements += min(elements, PREFETCH)
    return engine.size * elements


def gradient_blocks(engine: Engine, setting: Setting) -> Parts:
    """Gradients until the optimizer's step (DeepSpeed's stage_1_and_2.py and stage3.py)."""
    b, ranks, trained, parts = engine.size, setting.data_ranks(engine), engine.trained, Parts()
    if engine.stage <= 1:
        parts["gradients"] = b * trained
    if engine.stage == 0:
        parts["reduction"] = b * engine.bucket if ranks > 1 else 0  # flattened for the all-reduce
    if engine.stage in (1, 2):
        parts["gradient bucket"] = b * engine.bucket
        parts["reduction"] = b * engine.bucket if ranks > 1 else 0  # the slices of several ranks in one block
        if not engine.offload_optimizer:
            parts["gradient partition"] = b * trained / ranks
            if engine.stage == 2 and setting.micro_batches() > 1:
                parts["gradient partition"] *= 2  # the sum so far and the current micro-batch's
        if engine.stage == 1 and not setting.hardware.cpu:  # gradients move into the bucket
            parts["gradients"] = max(0, parts["gradients"] - parts["reduction"])
    if engine.stage == 3:
        parts["reduction"] = b * engine.bucket * (1 + 1 / ranks)  # reduce_scatter_coalesced's input and output
        if setting.hardware.cpu and ranks > 1:  # gloo scatters from a clone (ProcessGroupGloo, reduce_scatter)
            parts["reduction"] += b * engine.bucket
    return parts


def update_phase(engine: Engine, setting: Setting) -> Parts:
    """AdamW copies this rank's gradients into one block, and that into float32."""
    share, parts = engine.trained / setting.data_ranks(engine), Parts()
    if engine.stage == 0:
        parts["gradients"] = engine.size * engine.trained
    elif not engine.offload_optimizer:
        if engine.stage < 3:
            parts["gradient partition"] = engine.size * share
        parts["flat gradient"] = engine.size * share
        parts["gradient in fp32"] = 4 * share if engine.size < 4 else 0
    return parts
