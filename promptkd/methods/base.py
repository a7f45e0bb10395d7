"""What a method is: a small object that turns a window of examples into losses and updates."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from promptkd.config.options import OptimizerSettings
from promptkd.data.batching import MicroBatch, group_by_length, make_micro_batches
from promptkd.data.dataset import Example, ExampleSet
from promptkd.data.sampler import StepSampler
from promptkd.distributed.ranks import Ranks
from promptkd.engine.engine import FrozenModel, TrainEngine
from promptkd.engine.optim import OptimizerConfig
from promptkd.errors import UserError
from promptkd.generation.budget import decoding_budget
from promptkd.generation.decode import GenerationOutput, GenerationRequest, decode
from promptkd.generation.sampling import Sampling, TeacherMixture
from promptkd.models.vocabulary import SharedVocabulary
from promptkd.models.wrapper import LanguageModel
from promptkd.utils.profiling import phase


@dataclass
class NoSettings:
    """A method without options of its own."""


@dataclass(frozen=True)
class LengthLimits:
    """Sizes in tokens: of prompt and response together, of a prompt, of one padded forward pass.

    end_ids: the tokens that end a response. rollout_token_budget: of one decoding batch; None: what memory allows.
    """

    max_length: int
    max_prompt_length: int
    token_budget: int
    end_ids: Sequence[int]
    rollout_token_budget: int | None = None


@dataclass
class Data:
    """What a method trains and is evaluated on. folders: where it came from, by name, for the run's record."""

    train: ExampleSet
    dev: ExampleSet | None
    folders: dict[str, str]
    corpus: ExampleSet | None = None  # plain text, for a method that goes on with pre-training

    def __post_init__(self) -> None:
        if stale := next((each.stale for each in self.sets().values() if each.stale), None):
            raise UserError(stale)

    def sets(self) -> dict[str, ExampleSet]:
        """The data sets that are there, by name."""
        sets = {"train": self.train, "dev": self.dev, "corpus": self.corpus}
        return {name: each for name, each in sets.items() if each is not None}


@dataclass
class MethodContext:
    """What the trainer hands to a method: the two models and what it takes to use them."""

    student: TrainEngine
    teacher: PreTrainedModel | None
    tokenizer: Any
    ranks: Ranks
    limits: LengthLimits
    sampling: Sampling
    seed: int
    optimization: OptimizerConfig  # the student's; a method that trains more builds on it
    learner: Callable[[LanguageModel, OptimizerConfig], TrainEngine]  # makes a further engine, for the teacher
    data: Data
    windows: StepSampler
    shared: SharedVocabulary | None = None  # what the models' distributions are compared over; None: everything
    published_mean: bool = False  # mean of micro-batch means instead of the window's mean


@dataclass
class StepBatch:
    """This rank's examples of one optimizer step, in order; micro-batches are `batch_size` of them."""

    step: int  # from 1
    total: int  # steps of the whole run
    examples: list[Example]
    batch_size: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Time a phase of the step: its seconds go to the log as `<name>_seconds`."""
        began = time.perf_counter()
        with phase(name):
            yield
        self.seconds[f"{name}_seconds"] = time.perf_counter() - began


class Method(ABC):
    """One algorithm. `step` sees a window and the two models; it knows no launcher, file or other's option."""

    Settings: ClassVar[type] = NoSettings
    OptimizerSettings: ClassVar[type] = OptimizerSettings
    has_teacher: ClassVar[bool] = True
    teacher_has_engine: ClassVar[bool] = False  # one that ZeRO-3 can share out
    teacher: TrainEngine | FrozenModel  # of a method that asks one

    def __init__(self, context: MethodContext, settings: Any) -> None:
        self.context, self.settings = context, settings
        self.student = context.student

    @classmethod
    def needs_teacher(cls, settings: Any) -> bool:
        """Whether the teacher is ever asked, with these settings of the method."""
        return cls.has_teacher

    @classmethod
    def open_data(cls, settings: SimpleNamespace, tokenizer) -> Data:
        """Open what all settings together name: training examples, and dev examples unless --dev-num is 0."""
        data = settings.data
        if not data.data_dir:
            raise UserError("--data-dir is missing: name a folder with train_0.bin/.idx or train.jsonl")
        sizes = (tokenizer, data.max_prompt_length, data.max_length)
        how = {"template": data.template, "special_tokens": data.special_tokens}
        train = ExampleSet.open(data.data_dir, "train", *sizes, **how)
        how["special_tokens"] = train.format.special_tokens
        dev = ExampleSet.open(data.data_dir, "valid", *sizes, limit=data.dev_num, **how) if data.dev_num else None
        return Data(train, dev, {"data": data.data_dir})

    @classmethod
    def make_sampler(cls, settings: SimpleNamespace, data: Data, ranks: Ranks) -> StepSampler:
        """Which of the training examples make up each optimizer step."""
        how = settings.optimizer
        return StepSampler(
            len(data.train), how.batch_size, how.gradient_accumulation_steps, ranks.dp_size, ranks.dp_rank,
            seed=settings.run.seed_order, published=how.loss_normalization == "micro-batch",
        )  # fmt: skip

    @abstractmethod
    def step(self, window: StepBatch) -> dict[str, float]:
        """Take one optimizer step; return what the log should hold: means over the window's response tokens."""

    def learners(self) -> dict[str, TrainEngine]:
        """Everything that learns, by name."""
        return {"student": self.student}

    def state(self) -> dict[str, torch.Tensor]:
        """What this rank has to remember from one step to the next besides its learners, by name."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027 - nothing to take, by default
        """Take back what `state` gave; called before the first step of a resumed run, if there was anything."""

    def prompt(self) -> torch.Tensor | None:
        """The teacher's soft prompt, float32 [prompt_len, width], if the method tunes one."""
        return None

    def rollout(
        self,
        examples: Sequence[Example],
        rng_keys: Sequence[tuple[int, ...]],
        teacher_mixture: TeacherMixture | None = None,
        keep_states: bool = False,
    ) -> GenerationOutput:
        """Let the student, in eval mode, respond to every prompt.

        Args:
            examples: The examples with the prompts.
            rng_keys: For each example, what its random numbers belong to besides the run's seed.
            teacher_mixture: The teacher's part in the sampling distribution.
            keep_states: Whether to return the hidden states that predict the responses.
        """
        context, limits = self.context, self.context.limits
        request = GenerationRequest(
            [example.prompt for example in examples],
            limits.max_length - limits.max_prompt_length,
            limits.end_ids,
            context.sampling,
            rng_keys=[(context.seed, *key) for key in rng_keys],
            teacher_mixture=teacher_mixture,
            shared=context.shared,
            keep_states=keep_states,
        )
        longest = max(map(len, request.prompts), default=0) + request.max_new_tokens
        with self.student.gathered_model() as model:
            models = [model] if teacher_mixture is None else [model, teacher_mixture.model]
            token_budget = decoding_budget(models, longest, context.ranks, limits.rollout_token_budget)
            return decode(model, request, token_budget, broadcast=context.ranks.broadcast_tp)

    def micro_batches(self, window: StepBatch, responses: Sequence[Sequence[int]]) -> tuple[list[MicroBatch], int]:
        """Pack prompts with `responses`; as many micro-batches on each rank. Also the window's response tokens."""
        context = self.context
        lengths = [len(response) for response in responses]
        tokens = int(context.ranks.all_reduce_sum(torch.tensor(sum(lengths), device=context.ranks.device)))
        weights = self._shares(lengths, tokens, window.batch_size)
        prompts = [example.prompt for example in window.examples]
        sizes = [len(prompt) + length for prompt, length in zip(prompts, lengths)]
        budget = context.limits.token_budget
        count = context.ranks.all_reduce_max(len(group_by_length(sizes, budget)))
        return make_micro_batches(prompts, responses, weights, budget, context.ranks.device, count), tokens

    def _shares(self, lengths: list[int], tokens: int, batch_size: int) -> list[float]:
        """Each example's weight for one of its tokens. They make packing free: it cannot change the loss."""
        if not self.context.published_mean:
            return [1 / max(tokens, 1)] * len(lengths)
        means = len(lengths) // batch_size * self.context.ranks.dp_size
        sums = [sum(lengths[i : i + batch_size]) for i in range(0, len(lengths), batch_size)]
        return [1 / (max(sums[i // batch_size], 1) * means) for i in range(len(lengths))]
