"""MiniLLM (Gu et al., ICLR 2024): policy gradient for KL(student || teacher) on the student's own responses.

Rollouts are sampled from a mixture of student and teacher. Several passes of clipped updates go over each collection of
rollouts. They add the exact KL at each token and, if there is a corpus, a pre-training loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from minillm_baselines.rollout_buffer import RolloutBuffer, StoredRollout, advantages, returns, whiten
from minillm_baselines.rollout_sampler import RolloutSampler
from promptkd.config.options import OptimizerSettings
from promptkd.config.values import at_least, fraction, option
from promptkd.data.batching import MicroBatch
from promptkd.data.dataset import ExampleSet
from promptkd.data.row_files import find_rows
from promptkd.distributed.ranks import Ranks
from promptkd.engine.engine import FrozenModel, TrainEngine
from promptkd.errors import UserError
from promptkd.generation.sampling import TeacherMixture
from promptkd.losses import ClippedPolicy, CrossEntropy, ForwardKL, FrozenLogits, ReverseKL, Term, log_probs
from promptkd.methods.base import Method
from promptkd.methods.context import DatasetBundle, MethodContext, StepBatch
from promptkd.methods.corpus import CorpusSettings, with_corpus
from promptkd.models.wrapper import without_dropout
from promptkd.utils.transfer import to_device

if TYPE_CHECKING:
    from promptkd.config.resolve import RunConfig, RunOptions

SCHEDULES = {"constant_trm": "constant", "cosine_trm": "cosine_trm", "cosine_annealing": "cosine"}


@dataclass
class MiniLLMOptimizerSettings(OptimizerSettings):
    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)

    weight_decay: float = option(1e-6, "weight decay of AdamW. Biases and GPT-2's layer norms are not decayed")
    scheduler_name: str | None = option(
        None,
        "published name of the learning-rate schedule (default: --lr-decay-style)",
        choices=[*SCHEDULES],
        published=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheduler_name is not None:
            if self.lr_decay_style not in ("constant", SCHEDULES[self.scheduler_name]):
                raise UserError("--scheduler-name and --lr-decay-style are both given: leave one out")
            self.lr_decay_style = SCHEDULES[self.scheduler_name]  # type: ignore[assignment]


@dataclass
class MiniLLMSettings(CorpusSettings):
    prompt_data_dir: str = option(
        "", "folder of prompts: train_0.bin/.idx or train.jsonl, and valid.jsonl", numbers=False
    )
    ppo_epochs: int = option(4, "passes over each collection of rollouts")
    num_rollouts: int = option(256, "number of rollouts of a collection, on all ranks together")
    chunk_size: int = option(
        8, "number of prompts that a rank reads at a time. Surplus prompts of a collection are discarded"
    )
    teacher_mixed_alpha: float = option(0.2, "weight of the teacher in the mixture that rollouts are sampled from")
    reward_scaling: float = option(1.0, "value that rewards are divided by")
    cliprange_reward: float = option(100.0, "rewards are clipped to +- this value. 0 disables clipping")
    cliprange: float = option(0.2, "the probability ratio is clipped to 1 +- this value")
    gamma: float = option(0.95, "discount factor of future rewards")
    length_norm: bool = option(
        True,
        "log reward and rev_kl per token. Advantages are always divided by the remaining length, as published",
    )
    single_step_reg: bool = option(True, "add KL(student || teacher) at each token to the policy loss")
    whiten: Literal["response", "published"] = option(
        "response",
        "tokens over which advantages are whitened. response: response tokens. published: also padding, as zeros",
        published=True,
    )
    kd_ratio: float = option(
        0.5, "weight of the distillation loss in the pre-training loss. Cross-entropy is weighted by 1 - kd_ratio"
    )
    seed_ppo: int = option(42, "seed of the order of rollouts in each pass")
    seed_lm: int = option(
        7,
        "unused, as in the published code. --seed-order is the seed of the order of the corpus",
        numbers=False,
        published=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt_data_dir:
            raise UserError("--prompt-data-dir is missing: name a folder with train_0.bin/.idx or train.jsonl")
        at_least(1, ppo_epochs=self.ppo_epochs, num_rollouts=self.num_rollouts, chunk_size=self.chunk_size)
        at_least(0, cliprange=self.cliprange, cliprange_reward=self.cliprange_reward)
        at_least(0, seed_ppo=self.seed_ppo, seed_lm=self.seed_lm)
        fraction(teacher_mixed_alpha=self.teacher_mixed_alpha, gamma=self.gamma, kd_ratio=self.kd_ratio)
        if not self.reward_scaling > 0:
            raise UserError(f"--reward-scaling {self.reward_scaling} is not positive")


class MiniLLM(Method):
    Settings = MiniLLMSettings
    OptimizerSettings = MiniLLMOptimizerSettings

    def __init__(self, context: MethodContext, settings: MiniLLMSettings) -> None:
        super().__init__(context, settings)
        without_dropout(self.student.module)
        self.teacher = context.frozen_teacher()
        assert isinstance(context.sampler, RolloutSampler)
        self.sampler = context.sampler
        self.collection = RolloutBuffer(-1, [])

    @classmethod
    def check(cls, options: RunOptions) -> None:
        """Raise UserError for --data-dir, and for sampling options that change the models' probabilities."""
        if options.data.data_dir:
            raise UserError("--method minillm reads --prompt-data-dir and --lm-data-dir: leave --data-dir out")
        if options.lora.lora_dropout:
            raise UserError("--method minillm trains without dropout: leave --lora-dropout out")
        decoding = options.decoding
        if (decoding.temperature, decoding.top_k, decoding.top_p) != (1.0, 0, 1.0):
            raise UserError(
                "--method minillm weighs tokens by the models' own probabilities: leave --temperature 1, --top-k 0 "
                "and --top-p 1"
            )

    @classmethod
    def open_data(cls, config: RunConfig, tokenizer: Any) -> DatasetBundle:
        """Open the prompts, the dev set with its reference answers, and the corpus."""
        options, folder = config.data, config.method_settings.prompt_data_dir
        lengths = (options.max_prompt_length, options.max_length)
        train = ExampleSet.open(
            folder, "train", tokenizer, *lengths, prompts_only=True,
            template=options.template, option="--prompt-data-dir", special_tokens=options.special_tokens,
        )  # fmt: skip
        dev = None
        if options.dev_num:
            if find_rows(folder, "valid") is None:
                answers = Path(folder) / "valid.jsonl"
                raise UserError(f"{answers} is missing, and with it the dev set's answers: add it, or pass --dev-num 0")
            dev = ExampleSet.open(
                folder, "valid", tokenizer, *lengths, limit=options.dev_num, as_text=True, template=options.template,
                option="--prompt-data-dir", special_tokens=train.format.special_tokens,
            )  # fmt: skip
        return with_corpus(DatasetBundle(train, dev, {"data": folder}), config, tokenizer)

    @classmethod
    def make_sampler(cls, config: RunConfig, data: DatasetBundle, ranks: Ranks) -> RolloutSampler:
        """Return what selects the prompts of each collection and the rollouts of each optimizer step."""
        optimizer, options = config.optimizer, config.method_settings
        return RolloutSampler(
            len(data.train), options.num_rollouts, options.chunk_size * ranks.dp_size, options.ppo_epochs,
            optimizer.batch_size * ranks.dp_size, optimizer.gradient_accumulation_steps, ranks.dp_size, ranks.dp_rank,
            seed=options.seed_ppo, seed_order=config.run.seed_order,
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """Return the current collection of rollouts, which is the same on all ranks."""
        return self.collection.state() if self.collection.rollouts else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.collection = RolloutBuffer.from_state(state)

    def step(self, step_batch: StepBatch) -> dict[str, float]:
        """Update the student on rollouts of the current collection, and on texts of the corpus."""
        options, ranks = self.settings, self.context.ranks
        with step_batch.timer("rollout"):
            groups = self.rollouts_of(step_batch)
        rollouts = [stored for group in groups for stored in group]
        whitened = self.whitened(groups)
        batches, tokens = self.micro_batches(step_batch, [stored.response for stored in rollouts])
        with step_batch.timer("student"):
            texts = self.corpus_batches(step_batch)
            losses = self.update(batches, texts, rollouts, whitened)
        pg, reg = losses["pg_loss"], losses["reg_loss"]
        lm, ds = losses.get("lm_loss", 0.0), losses.get("ds_loss", 0.0)
        rl = pg + reg if options.single_step_reg else pg
        pt = (1 - options.kd_ratio) * lm + options.kd_ratio * ds
        row = {"tot_loss": rl + options.lm_coef * pt, "rl_loss": rl, "pg_loss": pg, "reg_loss": reg}
        if texts:
            row |= {"pt_loss": pt, "lm_loss": lm, "ds_loss": ds}
        sums = torch.tensor([_statistics(stored, options) for stored in rollouts], dtype=torch.float64).sum(0)
        reward, rev_kl, stu_lens, mixed_lens, count = ranks.all_reduce_sum(sums).tolist()
        means = {"reward": reward, "rev_kl": rev_kl, "stu_lens": stu_lens, "mixed_lens": mixed_lens}
        return {**row, **{name: value / count for name, value in means.items()}, "response_tokens": tokens}

    def rollouts_of(self, step_batch: StepBatch) -> list[list[StoredRollout]]:
        """Return this rank's rollouts of each accumulation step. Sample a collection when a new one begins."""
        groups = []
        for number, places in self.sampler.batches(step_batch.step):
            if number != self.collection.number:
                self.collection = self.collect(number, step_batch)
            groups.append([self.collection.rollouts[place] for place in places])
        return groups

    @torch.no_grad()
    def collect(self, number: int, step_batch: StepBatch) -> RolloutBuffer:
        """Sample responses to a collection's prompts, from the mixture and from the student, and score them."""
        options, context = self.settings, self.context
        rows, places = self.sampler.collection(number), self.sampler.local_indices()
        prompts = replace(step_batch, examples=[context.data.train[rows[place]] for place in places])
        # As published, greedy rollouts come from the student: only sampling uses the mixture.
        mixes = options.teacher_mixed_alpha > 0 and context.sampling.do_sample
        mix = TeacherMixture(self.teacher.module.model, options.teacher_mixed_alpha) if mixes else None
        keys = [(number, place) for place in places]
        mixed = self.rollout(prompts.examples, [(*key, 0) for key in keys], mix).responses
        own = mixed if mix is None else self.rollout(prompts.examples, [(*key, 1) for key in keys]).responses
        students, teachers = self.score(prompts, mixed)
        own_students, own_teachers = (students, teachers) if mix is None else self.score(prompts, own)
        stored = {}
        for i, place in enumerate(places):
            rewards = (teachers[i] - students[i]) / options.reward_scaling
            if options.cliprange_reward:
                rewards = rewards.clamp(-options.cliprange_reward, options.cliprange_reward)
            mixture = torch.lerp(students[i].exp(), teachers[i].exp(), options.teacher_mixed_alpha)
            difference = own_teachers[i] - own_students[i]
            kl = float((difference.exp() - 1 - difference).sum())
            importance = students[i].exp() / mixture
            stored[place] = StoredRollout(mixed[i], students[i], rewards, importance, kl, len(own[i]))
        return RolloutBuffer.gathered(number, stored, context.ranks)

    def score(self, prompts: StepBatch, responses: list[Tensor]) -> list[list[Tensor]]:
        """Return the log-probabilities of the responses' tokens under student and teacher, float32 `(length,)` each."""
        batches, _ = self.micro_batches(prompts, responses)
        return [_log_probs(model, batches, responses) for model in (self.student, self.teacher)]

    def whitened(self, groups: list[list[StoredRollout]]) -> list[Tensor]:
        """Return the advantages of all rollouts, whitened over the step, or as published over each micro-batch."""
        limits, whitened = self.context.limits, []
        longest = limits.max_length - limits.max_prompt_length
        together = groups if self.context.published_mean else [[stored for group in groups for stored in group]]
        for group in together:
            raw = [advantages(stored.rewards, self.settings.gamma) for stored in group]
            padding = len(raw) * longest - sum(map(len, raw)) if self.settings.whiten == "published" else 0
            whitened += whiten(raw, padding, self.context.ranks)
        return whitened

    def update(
        self, batches: list[MicroBatch], texts: list[MicroBatch], rollouts: list[StoredRollout], whitened: list[Tensor]
    ) -> dict[str, float]:
        """Take an optimizer step, without dropout, on rollouts and on texts of the corpus."""
        options, device = self.settings, self.context.ranks.device

        def losses(batch: MicroBatch) -> dict[str, Term]:
            teacher = self.teacher.predict(batch)
            if batch.source == "corpus":
                return {
                    "lm_loss": CrossEntropy(batch.targets, options.lm_coef * (1 - options.kd_ratio)),
                    "ds_loss": ForwardKL(teacher, options.lm_coef * options.kd_ratio),
                }
            members = [rollouts[i] for i in batch.members]
            parts = [whitened[i] for i in batch.members], [m.old for m in members], [m.importance for m in members]
            advantage, old, importance = (to_device(torch.cat(part), device) for part in parts)
            return {
                "pg_loss": ClippedPolicy(batch.targets, advantage, old, importance, options.cliprange),
                "reg_loss": ReverseKL(teacher, 1.0 if options.single_step_reg else 0.0),
            }

        self.student.train()  # All dropout rates are 0. Gradient checkpointing needs the mode.
        return self.student.update([*batches, *texts], losses)


def _log_probs(model: TrainEngine | FrozenModel, batches: list[MicroBatch], responses: list[Tensor]) -> list[Tensor]:
    """Return log p(token) of each response, on the CPU."""
    by_response: dict[int, Tensor] = {}
    for batch in batches:
        hidden = model.hidden_states(batch)
        with model.lm_head() as head:
            values = log_probs(FrozenLogits(hidden, head), batch.targets).cpu()
        by_response |= zip(batch.members, torch.split(values, [len(responses[i]) for i in batch.members]))
    return [by_response[i] for i in range(len(responses))]


def _statistics(stored: StoredRollout, options: MiniLLMSettings) -> tuple[float, ...]:
    """Return reward, reverse KL, tokens of the student's own response and of the rollout, and 1, to be summed."""
    length, own_length = len(stored.response), stored.own_length
    per_token = (length, own_length) if options.length_norm else (1, 1)
    reward = float(returns(stored.rewards, options.gamma)[0])
    return reward / per_token[0], stored.own_kl / per_token[1], own_length, length, 1.0
