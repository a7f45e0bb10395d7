"""What the trainer hands to a method: models, data, limits, and the examples of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedModel

from promptkd.data.dataset import Example, ExampleSet
from promptkd.data.sampler import StepSampler
from promptkd.distributed.ranks import Ranks
from promptkd.engine.engine import FrozenModel, TrainEngine
from promptkd.engine.optim import OptimizerConfig
from promptkd.engine.teacher_cache import TeacherCache
from promptkd.errors import UserError
from promptkd.generation.sampling import Sampling
from promptkd.models.vocabulary import SharedVocabulary
from promptkd.models.wrapper import LanguageModel
from promptkd.utils.profiling import phase


@dataclass(frozen=True)
class LengthLimits:
    """Lengths and budgets, in tokens.

    Attributes:
        max_length: Of prompt and response together.
        max_prompt_length: Of a prompt.
        token_budget: Of one padded forward pass.
        end_ids: Token ids that end a response.
        rollout_token_budget: Of one decoding batch. None if memory is the limit.
    """

    max_length: int
    max_prompt_length: int
    token_budget: int
    end_ids: Sequence[int]
    rollout_token_budget: int | None = None


@dataclass
class DatasetBundle:
    """The data sets of a run.

    Attributes:
        train: Training examples.
        dev: Examples of the evaluations during training, if there are any.
        folders: Where the data came from, by name, for the run's record.
        corpus: Plain text for a language-modeling loss, if the method has one.
        paired: Other responses to the prompts of `train`, for a method that compares two.
    """

    train: ExampleSet
    dev: ExampleSet | None
    folders: dict[str, str]
    corpus: ExampleSet | None = None
    paired: ExampleSet | None = None

    def __post_init__(self) -> None:
        if stale := next((each.stale for each in self.sets().values() if each.stale), None):
            raise UserError(stale)

    def sets(self) -> dict[str, ExampleSet]:
        """Return the data sets of this run by name."""
        sets = {"train": self.train, "dev": self.dev, "corpus": self.corpus, "paired": self.paired}
        return {name: each for name, each in sets.items() if each is not None}


@dataclass
class MethodContext:
    """What a method works with: the models, the data, and the run's options about both.

    Attributes:
        optimization: The student's. A method that trains something else, too, derives its own from it.
        make_engine: Starts a further engine, on the teacher's DeepSpeed configuration.
        sampler: Selects the training examples of each step.
        corpus_sampler: Selects the rows of the corpus of each step.
        teacher_cache: The teacher's states on the responses of the data, if the run uses a cache of them.
        shared: The token ids over which the models' distributions are compared. None if these are all.
        published_mean: Whether losses are means of micro-batch means instead of means over the step's tokens.
    """

    student: TrainEngine
    teacher: PreTrainedModel | None
    tokenizer: Any
    ranks: Ranks
    limits: LengthLimits
    sampling: Sampling
    seed: int
    optimization: OptimizerConfig
    make_engine: Callable[[LanguageModel, OptimizerConfig], TrainEngine]
    data: DatasetBundle
    sampler: Sampler
    corpus_sampler: StepSampler | None = None
    teacher_cache: TeacherCache | None = None
    shared: SharedVocabulary | None = None
    published_mean: bool = False

    def frozen_teacher(self) -> FrozenModel:
        """Return the teacher as a model that only predicts."""
        assert self.teacher is not None  # `check_options` has seen to it
        model = FrozenModel(LanguageModel(self.teacher, shared=self.shared), self.ranks.device)
        return model if self.teacher_cache is None else self.teacher_cache.apply(model, self.ranks)


class Sampler(Protocol):
    """What selects the examples of each optimizer step."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of a pass over the examples."""

    def epoch_of(self, step: int) -> int:
        """Return the pass, from 1, that optimizer step `step`, from 1, belongs to."""

    def indices(self, step: int) -> list[int]:
        """Return the row numbers of this rank's examples in optimizer step `step`."""


@dataclass
class StepBatch:
    """This rank's examples of one optimizer step.

    Attributes:
        step: Number of the step, from 1.
        total: Number of steps of the run.
        examples: The examples in order.
        batch_size: Examples of one accumulation step.
        seconds: Duration of each phase of the step, by name.
    """

    step: int
    total: int
    examples: list[Example]
    batch_size: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Measure a phase of the step, which is logged as `<name>_seconds`."""
        began = time.perf_counter()
        with phase(name):
            yield
        self.seconds[f"{name}_seconds"] = time.perf_counter() - began
