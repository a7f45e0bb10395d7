"""The base class of methods: a method turns the examples of an optimizer step into losses and updates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from promptkd.config.options import OptimizerSettings
from promptkd.data.batching import MicroBatch, TokenIds, group_with_little_padding, make_micro_batches
from promptkd.data.dataset import Example, ExampleSet
from promptkd.data.sampler import StepSampler
from promptkd.distributed.ranks import Ranks
from promptkd.engine.engine import FrozenModel, TrainEngine
from promptkd.errors import UserError
from promptkd.generation.budget import decoding_budget
from promptkd.generation.decode import GenerationOutput, GenerationRequest, decode
from promptkd.generation.sampling import TeacherMixture, uniform_draws
from promptkd.methods.context import DatasetBundle, MethodContext, Sampler, StepBatch

if TYPE_CHECKING:
    from promptkd.config.resolve import RunConfig, RunOptions


# The last part of the keys of random numbers, for other uses than sampling the student's response.
COIN, REPLAY, TEACHER = 1, 2, 3


@dataclass
class NoSettings:
    """The options of a method that has none."""


class Method(ABC):
    """A distillation algorithm.

    Attributes:
        Settings: The dataclass of the method's options.
        OptimizerSettings: The dataclass of the optimizer's options, if the method has other defaults.
        has_teacher: Whether the method can use a teacher.
        teacher: The teacher, if the method uses one.
    """

    Settings: ClassVar[type] = NoSettings
    OptimizerSettings: ClassVar[type] = OptimizerSettings
    has_teacher: ClassVar[bool] = True
    teacher: TrainEngine | FrozenModel

    def __init__(self, context: MethodContext, settings: Any) -> None:
        self.context, self.settings = context, settings
        self.student = context.student

    @classmethod
    def needs_teacher(cls, settings: Any) -> bool:
        """Return whether the method uses the teacher with these options of its own."""
        return cls.has_teacher

    @classmethod
    def trains_teacher(cls, settings: Any) -> bool:
        """Return whether the teacher has a DeepSpeed engine, which ZeRO-3 can partition."""
        return False

    @classmethod  # noqa: B027 - most methods have no such rules
    def check(cls, options: RunOptions) -> None:
        """Raise UserError for options of the run that do not go with the method."""

    @classmethod
    def open_data(cls, config: RunConfig, tokenizer: Any) -> DatasetBundle:
        """Open the training examples, and the dev examples unless --dev-num is 0."""
        options = config.data
        if not options.data_dir:
            raise UserError("--data-dir is missing: name a folder with train_0.bin/.idx or train.jsonl")
        lengths = (options.max_prompt_length, options.max_length)
        train = ExampleSet.open(
            options.data_dir, "train", tokenizer, *lengths,
            template=options.template, special_tokens=options.special_tokens,
        )  # fmt: skip
        dev = None
        if options.dev_num:
            dev = ExampleSet.open(
                options.data_dir, "valid", tokenizer, *lengths, limit=options.dev_num,
                template=options.template, special_tokens=train.format.special_tokens,
            )  # fmt: skip
        return DatasetBundle(train, dev, {"data": options.data_dir})

    @classmethod
    def make_sampler(cls, config: RunConfig, data: DatasetBundle, ranks: Ranks) -> Sampler:
        """Return what selects the training examples of each optimizer step."""
        return step_sampler(config, len(data.train), ranks)

    @abstractmethod
    def step(self, step_batch: StepBatch) -> dict[str, float]:
        """Take one optimizer step.

        Returns:
            The values to log. Losses are means over the response tokens of the step.
        """

    def measuring_teacher(self) -> TrainEngine | FrozenModel:
        """Return the teacher against which exposure bias is measured, for any method."""
        return self.teacher if hasattr(self, "teacher") else self.context.frozen_teacher()

    def learners(self) -> dict[str, TrainEngine]:
        """Return all engines that train something, by name."""
        return {"student": self.student}

    def after_evaluation(self, dev_loss: float) -> None:  # noqa: B027 - most methods do not use it
        """Take note of the dev loss before training and after each evaluation, the same on all ranks."""

    def state(self) -> dict[str, Tensor]:
        """Return what this rank has to keep from one step to the next besides its engines, by name."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - a method may have no state
        """Restore what `state` returned, before the first step of a resumed run. It is not called for nothing."""

    def prompt(self) -> Tensor | None:
        """Return the teacher's soft prompt, float32 `(prompt_len, hidden)`, if the method tunes one."""
        return None

    def rollout(
        self,
        examples: Sequence[Example],
        rng_keys: Sequence[tuple[int, ...]],
        teacher_mixture: TeacherMixture | None = None,
        keep_states: bool = False,
        model: TrainEngine | FrozenModel | None = None,
    ) -> GenerationOutput:
        """Let a model, in evaluation mode, respond to every prompt.

        Args:
            examples: The examples with the prompts.
            rng_keys: For each example, what its random numbers belong to besides the run's seed.
            teacher_mixture: The teacher's part in the sampling distribution.
            keep_states: Whether to return the hidden states that predict the responses.
            model: The model. The default is the student.
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
        with (model or self.student).gathered_model() as gathered:
            models = [gathered] if teacher_mixture is None else [gathered, teacher_mixture.model]
            token_budget = decoding_budget(models, longest, context.ranks, limits.rollout_token_budget)
            return decode(gathered, request, token_budget, broadcast=context.ranks.broadcast_tp)

    def generate(
        self,
        step_batch: StepBatch,
        chosen: Iterable[int],
        model: TrainEngine | FrozenModel | None = None,
        keep_states: bool = False,
    ) -> GenerationOutput:
        """Let the student, or another model, respond to the prompts of a step that `chosen` lists.

        All ranks have to call it. The random numbers belong to the step and the example.
        """
        examples = [step_batch.examples[i] for i in chosen]
        stream = () if model is None else (TEACHER,)
        rng_keys = [(step_batch.step, example.index, *stream) for example in examples]
        return self.rollout(examples, rng_keys, keep_states=keep_states, model=model)

    def mixed_responses(
        self,
        step_batch: StepBatch,
        student_fraction: float,
        given: Sequence[TokenIds] | None = None,
        keep_states: bool = False,
    ) -> tuple[list[TokenIds], list[Tensor] | None]:
        """Let the student respond to each prompt with a probability. The other responses are given.

        Args:
            step_batch: The prompts.
            student_fraction: The probability. Whether a prompt is chosen belongs to the step and the example.
            given: The other responses. The default is those of the data.
            keep_states: Whether to return the hidden states that the student decoded with.

        Returns:
            The responses, and the hidden states if all responses are the student's.
        """
        seed, step = self.context.seed, step_batch.step
        draws = [uniform_draws(seed, step, example.index, COIN, count=1)[0] for example in step_batch.examples]
        chosen = [i for i, draw in enumerate(draws) if draw < student_fraction]
        responses = list(given or [example.response for example in step_batch.examples])
        if not student_fraction:
            return responses, None
        keep_states = keep_states and student_fraction == 1
        with step_batch.timer("rollout"):
            output = self.generate(step_batch, chosen, keep_states=keep_states)
        for i, response in zip(chosen, output.responses):
            responses[i] = response
        return responses, output.hidden_states if keep_states else None

    def micro_batches(
        self, step_batch: StepBatch, responses: Sequence[TokenIds], source: str = ""
    ) -> tuple[list[MicroBatch], int]:
        """Group prompts and responses into padded micro-batches, as many on each rank.

        Args:
            step_batch: The prompts.
            responses: Token ids of a response to each prompt.
            source: Name of this kind of responses, for `MicroBatch.source`.

        Returns:
            The micro-batches, and the number of response tokens of the step on all ranks.
        """
        context = self.context
        lengths = [len(response) for response in responses]
        tokens = int(context.ranks.all_reduce_sum(torch.tensor(sum(lengths))))
        weights = self.token_weights(lengths, tokens, step_batch.batch_size)
        prompts = [example.prompt for example in step_batch.examples]
        sizes = [len(prompt) + length for prompt, length in zip(prompts, lengths)]
        budget = context.limits.token_budget
        count = context.ranks.all_reduce_max(len(group_with_little_padding(sizes, budget, context.ranks.device)))
        batches = make_micro_batches(prompts, responses, weights, budget, context.ranks.device, count)
        rows = [example.index for example in step_batch.examples]
        return [replace(batch, source=source, examples=[rows[i] for i in batch.members]) for batch in batches], tokens

    def corpus_batches(self, step_batch: StepBatch) -> list[MicroBatch]:
        """Return micro-batches of the step's rows of the corpus, none if there is no corpus."""
        sampler, corpus = self.context.corpus_sampler, self.context.data.corpus
        if sampler is None or corpus is None:
            return []
        texts = [corpus[row] for row in sampler.indices(step_batch.step)]
        return self.micro_batches(replace(step_batch, examples=texts), [text.response for text in texts], "corpus")[0]

    def token_weights(self, lengths: list[int], tokens: int, batch_size: int) -> list[float]:
        """Return the weight of a response token of each example. With it, grouping cannot change the loss."""
        if not self.context.published_mean:
            return [1 / max(tokens, 1)] * len(lengths)
        means = len(lengths) // batch_size * self.context.ranks.dp_size
        sums = [sum(lengths[i : i + batch_size]) for i in range(0, len(lengths), batch_size)]
        return [1 / (max(sums[i // batch_size], 1) * means) for i in range(len(lengths))]


def step_sampler(config: RunConfig, examples: int, ranks: Ranks) -> StepSampler:
    """Return the sampler of `examples` examples with the run's batch size and seed."""
    options = config.optimizer
    return StepSampler(
        examples, options.batch_size, options.gradient_accumulation_steps, ranks.dp_size, ranks.dp_rank,
        seed=config.run.seed_order, published=options.loss_normalization == "micro-batch",
    )  # fmt: skip
