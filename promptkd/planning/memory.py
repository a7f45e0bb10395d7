"""Memory of one rank, in bytes: what it holds throughout, and what each phase of a step adds. The formulas.

Letters in comments: N parameters of a model on this rank (tensor parallelism divides products), D ranks that share the
optimizer's work, b bytes of a number (4 in fp32, else 2), T padded tokens of a forward pass, w width, f feed-forward
width, V vocabulary. A factor without a letter is bytes: 4 is a float32.

Checked against measured runs on a CPU by benchmarks/plan.py. Nothing is fitted but two constants (held.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from promptkd.planning.decoding import decoding, decoding_rows, forward_only
from promptkd.planning.held import CPU_FRAMEWORK, GPU_FRAMEWORK, Parts, building, held_by
from promptkd.planning.setting import Engine, Setting
from promptkd.utils.memory_bounds import BLOCK, positions_per_chunk

PREFETCH = 50_000_000  # elements: DeepSpeed's stage3_prefetch_bucket_size

WORKING = ("activations", "logits", "key-value cache", "states")


@dataclass(frozen=True)
class Memory:
    """held: throughout the run; phases: name -> what it adds; host: in the machine's memory, with offload.

    start: what building the engines needs at its peak, in all. framework: outside of torch's tensors.
    """

    cpu: bool
    framework: float
    held: Parts
    phases: dict[str, Parts]
    start: float
    host: Parts

    def of_phase(self, name: str) -> float:
        return self.framework + self.held.total() + self.phases[name].total()

    @property
    def peak(self) -> float:
        """Allocated on a GPU, resident on a CPU.

        A GPU's allocator gives a phase the room that another has left, so the largest phase counts. glibc's, told to
        keep what is freed (allocator.py), finds among the small blocks that activations left no room for a gradient
        buffer, which is one block: on a CPU the largest of each of these kinds counts, though they are not there
        at the same time. Only what forward passes make and drop (WORKING) shares its room between phases.
        """
        if not self.cpu:
            return max(self.start, *map(self.of_phase, self.phases))
        working = max(sum(parts[name] for name in WORKING) for parts in self.phases.values())
        kinds = {name for parts in self.phases.values() for name in parts if name not in WORKING}
        blocks = sum(max(parts[name] for parts in self.phases.values()) for name in kinds)
        return max(self.start, self.framework + self.held.total() + working + blocks)


def memory_of(setting: Setting) -> Memory:
    """All of it for one rank of a run."""
    held, host = Parts(), Parts()
    engines = {"student": setting.student, "teacher": setting.teacher}
    start = 0.0
    framework = CPU_FRAMEWORK if setting.hardware.cpu else GPU_FRAMEWORK
    for name, engine in engines.items():
        if engine is None:
            continue
        before = held.total()
        device, offloaded = held_by(engine, name, setting)
        held += device
        if setting.hardware.cpu:
            held += offloaded  # the host is the device
        else:
            host += offloaded
        start = max(start, framework + before + building(engine, setting))
    phases = {"student": student_phase(setting), "update": update_phase(setting.student, setting)}
    if setting.method == "promptkd":
        phases = {"rollout": rollout_phase(setting), "prompt": prompt_phase(setting), **phases}
        # The window's states are kept from the rollout to the end of the step (methods/promptkd.py, `rollout`).
        kept = setting.rows * setting.max_new * setting.student.shape.width * setting.student.size
        for parts in phases.values():
            parts["states"] += kept
    if setting.dev_rows:
        phases["evaluation"] = evaluation_phase(setting)
    return Memory(setting.hardware.cpu, framework, held, phases, start, host)


def activations(engine: Engine, tokens: int, rows: int, cpu: bool) -> float:
    """What the backward pass needs of a forward pass over `rows` sequences, `tokens` in all, and the gradients' way.

    Counted in transformers' modules with sdpa attention (no attention matrix is kept). Products save their input only
    if their weight is trained, so a frozen teacher with a soft prompt keeps about half.
    """
    layer = _layer(engine, tokens, rows, cpu)
    backward = engine.size * tokens * (2 * engine.shape.inner / engine.tensor + 2 * engine.shape.width)
    ends = 3 * engine.size * tokens * engine.shape.width  # embeddings' sum, last norm and its input
    if engine.checkpointing:  # each layer keeps its input, one is recomputed at a time
        return engine.shape.layers * engine.size * tokens * engine.shape.width + layer + backward + ends
    return engine.shape.layers * layer + backward + ends


def _layer(engine: Engine, tokens: int, rows: int, cpu: bool) -> float:
    shape, b, trains = engine.shape, engine.size, not (engine.prompt or engine.frozen)
    cut = engine.tensor
    attention = (2 * shape.queries + 2 * shape.keys) / cut  # queries, keys, values, and the sum that they make
    if shape.gated:
        inner = (4 if trains else 3) * shape.inner / cut  # gate, its activation, up; their product for the last matrix
        norms = (4 if trains else 0) * shape.width  # two norms: before and after their weight
        return tokens * (b * (attention + inner + norms) + 2 * 4 * shape.width)  # RMS norms keep their input in fp32
    inner = shape.inner / cut * (2 if trains and shape.family == "gpt2" else 1)  # a ReLU's result serves both sides
    width = (4 if trains else 2) * shape.width  # residual stream before each norm; what the norms make
    dropout = 0.0
    if trains and shape.dropout:
        dropout = 2 * shape.width * (b if cpu else 1)  # a mask for each residual
        if cpu:  # no fused attention with dropout there: matrices, their dropout and its noise
            dropout += 3 * b * shape.heads / cut * tokens / rows
    return tokens * (b * (attention + inner + width) + dropout)


def logits(setting: Setting, engine: Engine, references: int, tokens: int, trained: bool) -> float:
    """losses.distill: logits of one chunk for the model and each reference, float32 passes block by block."""
    shape, b = engine.shape, engine.size
    chunk, block = min(positions_per_chunk(shape.vocab, setting.device), tokens), min(BLOCK[setting.device], tokens)
    needed = shape.vocab * (b * (1 + references) * chunk + 4 * 5 * block)
    needed += b * tokens * shape.width * (1 + references)  # their hidden states' gradient, the references' states
    if trained:  # gradient of the head in float32, cast; a tied table's own gradient before both are added
        needed += shape.head * (4 + (2 * b if b < 4 else 0) + (b if shape.tied else 0))
    return needed


def rollout_phase(setting: Setting) -> Parts:
    """rollout.decode by the student: a cache that grows, the states that predicted each token."""
    student, rows = setting.student, decoding_rows(setting, setting.student, setting.rows)
    parts = decoding(setting, student, rows)
    parts["states"] = rows * setting.max_new * student.shape.width * student.size
    return parts


def evaluation_phase(setting: Setting) -> Parts:
    """Dev loss, then the answers for ROUGE-L and exposure bias; the largest of each kind."""
    student, teacher, rows = setting.student, setting.teacher, setting.micro_rows(rows=setting.dev_rows)
    loss = Parts({"activations": forward_only(student, rows * (setting.length - 1))})
    loss["logits"] = logits(setting, student, 0, rows * setting.max_new, trained=False)
    parts = loss | decoding(setting, student, decoding_rows(setting, student, setting.dev_rows))
    if setting.exposure_rows:
        parts |= decoding(setting, teacher, decoding_rows(setting, teacher, setting.exposure_rows))
    return parts


def prompt_phase(setting: Setting) -> Parts:
    """The teacher without the prompt (no gradient), then with it: gradient through all layers to the prompt."""
    teacher, rows = setting.teacher, setting.micro_rows()
    tokens = rows * (setting.length - 1 + teacher.prompt)
    parts = Parts()
    parts["activations"] = activations(teacher, tokens, rows, setting.hardware.cpu)
    parts["logits"] = logits(setting, teacher, 2, rows * setting.max_new, trained=False)
    parts["gathered weights"] = gathered(teacher, setting)
    if setting.student.stage == 3:
        parts["gathered weights"] += setting.student.size * setting.student.shape.head
    if teacher.stage in (1, 2) and not setting.hardware.cpu:
        parts["gradient bucket"] = teacher.size * teacher.bucket  # whole, though the prompt is small
    return parts


def student_phase(setting: Setting) -> Parts:
    """The teacher's states (no gradient), then the student's forward and backward pass; gradients pile up."""
    student, teacher, rows, cpu = setting.student, setting.teacher, setting.micro_rows(), setting.hardware.cpu
    tokens = rows * (setting.length - 1)
    parts = Parts()
    parts["activations"] = activations(student, tokens, rows, cpu)
    if teacher is not None:
        forward = forward_only(teacher, tokens + rows * teacher.prompt)
        parts["activations"] = max(parts["activations"], forward)
        parts["gathered weights"] = gathered(teacher, setting)
    parts["logits"] = logits(setting, student, 1 if teacher else 0, rows * setting.max_new, trained=True)
    parts["gathered weights"] += gathered(student, setting)
    parts += gradient_blocks(student, setting)
    return parts


def gathered(engine: Engine, setting: Setting) -> float:
    """ZeRO-3 keeps up to stage3_max_live_parameters whole; of packed weights each is unpacked for its product."""
    if engine.packed != "none":
        return engine.size * engine.shape.inner * engine.shape.width
    if engine.stage != 3:
        return 0.0
    elements = min(engine.parameters, engine.live)
    if setting.hardware.cpu and setting.data_ranks(engine) > 1:  # gloo gathers into a flat copy (ProcessGroupGloo)
        elements += min(elements, PREFETCH)
    return engine.size * elements


def gradient_blocks(engine: Engine, setting: Setting) -> Parts:
    """Gradients until the optimizer takes them: stage_1_and_2.py and stage3.py."""
    b, ranks, trained, parts = engine.size, setting.data_ranks(engine), engine.trained, Parts()
    touched = min(engine.bucket, trained)
    if engine.stage <= 1:
        parts["gradients"] = b * trained
    if engine.stage == 0:
        parts["reduction"] = b * touched if ranks > 1 else 0  # flattened for the all-reduce
    if engine.stage in (1, 2):
        # One block of reduce_bucket_size elements; on a CPU pages that are never touched do not count.
        parts["gradient bucket"] = b * (touched if setting.hardware.cpu else engine.bucket)
        parts["reduction"] = b * touched if ranks > 1 else 0  # slices of several ranks, put together
        if not engine.offload_optimizer:
            parts["gradient partition"] = b * trained / ranks
            if engine.stage == 2 and setting.micro_batches() > 1:
                parts["gradient partition"] *= 2  # the sum so far and this micro-batch's
        if engine.stage == 1 and not setting.hardware.cpu:  # a gradient leaves its place for the bucket
            parts["gradients"] = max(0, parts["gradients"] - parts["reduction"])
    if engine.stage == 3:
        parts["reduction"] = b * touched * (1 + 1 / ranks)  # reduce_scatter_coalesced's input and output
        if setting.hardware.cpu and ranks > 1:  # gloo scatters from a clone (ProcessGroupGloo, reduce_scatter)
            parts["reduction"] += b * touched
    return parts


def update_phase(engine: Engine, setting: Setting) -> Parts:
    """AdamW: this rank's gradients in one block, in float32 beside it where they were not."""
    share, parts = engine.trained / setting.data_ranks(engine), Parts()
    if engine.stage == 0:
        parts["gradients"] = engine.size * engine.trained
    elif not engine.offload_optimizer:
        kept = "gradient partition" if engine.stage < 3 else "flat gradient"
        parts[kept] += engine.size * share
        parts["flat gradient"] += (engine.size if engine.stage < 3 else 0) * share
        parts["gradient in fp32"] = 4 * share if engine.size < 4 else 0
    return parts
