"""MiniLLM (Gu et al., ICLR 2024): policy gradient for KL(student || teacher) on the student's own answers.

A collection of rollouts is drawn from a mixture of student and teacher; several passes of clipped updates go
over it, each with the exact KL at every token and, where there is a corpus, a pre-training loss beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from minillm_baselines.rollout_buffer import RolloutBuffer, StoredRollout, advantages, returns, whiten
from minillm_baselines.rollout_sampler import RolloutSampler
from promptkd.config.options import OptimizerSettings
from promptkd.config.values import at_least, option
from promptkd.data.batching import MicroBatch
from promptkd.data.dataset import ExampleSet
from promptkd.data.row_files import find_rows
from promptkd.data.sampler import StepSampler
from promptkd.data.token_file import TokenFile
from promptkd.distributed.ranks import Ranks
from promptkd.engine.engine import FrozenModel, TrainEngine
from promptkd.errors import UserError
from promptkd.generation.sampling import TeacherMixture
from promptkd.losses import ClippedPolicy, CrossEntropy, ForwardKL, FrozenLogits, ReverseKL, Term, log_probs
from promptkd.methods.base import Data, Method, MethodContext, StepBatch
from promptkd.models.loading import load_config
from promptkd.models.wrapper import LanguageModel, without_dropout

MAKE_CORPUS = "leave it out (--lm-data-dir=), or run python tools/process_data.py corpus --raw TEXT --tokenizer MODEL"
SCHEDULES = {"constant_trm": "constant", "cosine_trm": "cosine_trm", "cosine_annealing": "cosine"}


@dataclass
class MiniLLMOptimizerSettings(OptimizerSettings):
    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)

    weight_decay: float = option(1e-6, "AdamW's weight decay; biases and GPT-2's layer norms have none")
    scheduler_name: str | None = option(
        None, "published name of the schedule, instead of --lr-decay-style", choices=[*SCHEDULES]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheduler_name is not None:
            if self.lr_decay_style not in ("constant", SCHEDULES[self.scheduler_name]):
                raise UserError("--scheduler-name and --lr-decay-style are both given: leave one out")
            self.lr_decay_style = SCHEDULES[self.scheduler_name]


@dataclass
class MiniLLMSettings:
    prompt_data_dir: str = option(
        "", "folder of prompts: train_0.bin/.idx or train.jsonl, and valid.jsonl", numbers=False
    )
    lm_data_dir: str | None = option(
        None, "folder of the pre-training corpus' train_0.bin/.idx; default: no corpus", numbers=False
    )
    ppo_epochs: int = option(4, "passes over a collection of rollouts")
    num_rollouts: int = option(256, "rollouts of a collection, on all ranks together")
    chunk_size: int = option(8, "prompts a rank takes at a time; what a collection has over is passed by")
    teacher_mixed_alpha: float = option(0.2, "the teacher's share in the distribution rollouts are drawn from")
    reward_scaling: float = option(1.0, "rewards are divided by this")
    cliprange_reward: float = option(100.0, "rewards are clipped to +- this; 0: not clipped")
    cliprange: float = option(0.2, "the probability ratio is clipped to 1 +- this")
    gamma: float = option(0.95, "discount of later rewards")
    length_norm: bool = option(
        True, "log reward and rev_kl per token (advantages are per token left in any case, as published)"
    )
    single_step_reg: bool = option(True, "add KL(student || teacher) at each token to the policy's loss")
    whiten: Literal["response", "published"] = option(
        "response", "whiten advantages over response tokens; published: and over padding, as zeros"
    )
    kd_ratio: float = option(0.5, "weight of the teacher's term in the pre-training loss; 1 - it: of the tokens")
    lm_coef: float = option(1.0, "weight of the pre-training loss")
    seed_ppo: int = option(42, "seeds the order of the rollouts in each pass")
    seed_lm: int = option(
        7, "read and never used by the published code, and here: --seed-order orders the corpus, too", numbers=False
    )

    def __post_init__(self) -> None:
        self.lm_data_dir = self.lm_data_dir or None  # `--lm-data-dir=` behind a script's own leaves the corpus out
        if not self.prompt_data_dir:
            raise UserError("--prompt-data-dir is missing: name a folder with train_0.bin/.idx or train.jsonl")
        at_least(1, ppo_epochs=self.ppo_epochs, num_rollouts=self.num_rollouts, chunk_size=self.chunk_size)
        at_least(0, cliprange=self.cliprange, cliprange_reward=self.cliprange_reward, lm_coef=self.lm_coef)
        at_least(0, seed_ppo=self.seed_ppo, seed_lm=self.seed_lm)
        for name in ("teacher_mixed_alpha", "gamma", "kd_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is not between 0 and 1")
        if not self.reward_scaling > 0:
            raise UserError(f"--reward-scaling {self.reward_scaling} is not positive")


class MiniLLM(Method):
    Settings = MiniLLMSettings
    OptimizerSettings = MiniLLMOptimizerSettings

    def __init__(self, context: MethodContext, settings: MiniLLMSettings) -> None:
        super().__init__(context, settings)
        without_dropout(self.student.module)
        self.teacher = FrozenModel(LanguageModel(context.teacher, shared=context.shared), context.ranks.device)
        self.collection = RolloutBuffer(-1, [])

    @classmethod
    def open_data(cls, settings: SimpleNamespace, tokenizer) -> Data:
        """Prompts to answer, gold answers to prompts for the dev set, and the corpus."""
        data, mine, decoding = settings.data, settings.method_settings, settings.decoding
        if data.data_dir:
            raise UserError("--method minillm reads --prompt-data-dir and --lm-data-dir: leave --data-dir out")
        if (decoding.temperature, decoding.top_k, decoding.top_p) != (1.0, 0, 1.0):
            raise UserError(
                "--method minillm weighs tokens by the models' own probabilities: leave --temperature 1, --top-k 0 "
                "and --top-p 1"
            )
        sizes = (tokenizer, data.max_prompt_length, data.max_length)
        how = {"template": data.template, "option": "--prompt-data-dir", "special_tokens": data.special_tokens}
        train = ExampleSet.open(mine.prompt_data_dir, "train", *sizes, prompts_only=True, **how)
        how["special_tokens"] = train.format.special_tokens
        dev, folders = None, {"data": mine.prompt_data_dir}
        if data.dev_num:
            answers = Path(mine.prompt_data_dir) / "valid.jsonl"
            if find_rows(mine.prompt_data_dir, "valid") is None:
                raise UserError(f"{answers} is missing, and with it the dev set's answers: add it, or pass --dev-num 0")
            dev = ExampleSet.open(mine.prompt_data_dir, "valid", *sizes, limit=data.dev_num, as_text=True, **how)
        if mine.lm_data_dir is None:
            return Data(train, dev, folders)
        corpus = ExampleSet.open(mine.lm_data_dir, "train", *sizes, option="--lm-data-dir", make=MAKE_CORPUS)
        _check_rows(mine.lm_data_dir, settings.models.model_path)
        return Data(train, dev, {**folders, "corpus": mine.lm_data_dir}, corpus)

    @classmethod
    def make_sampler(cls, settings: SimpleNamespace, data: Data, ranks: Ranks) -> RolloutSampler:
        how, mine = settings.optimizer, settings.method_settings
        corpus = data.corpus and StepSampler(
            len(data.corpus), how.batch_size, how.gradient_accumulation_steps, ranks.dp_size, ranks.dp_rank,
            seed=settings.run.seed_order, published=how.loss_normalization == "micro-batch",
        )  # fmt: skip
        return RolloutSampler(
            len(data.train), mine.num_rollouts, mine.chunk_size * ranks.dp_size, mine.ppo_epochs,
            how.batch_size * ranks.dp_size, how.gradient_accumulation_steps, ranks.dp_size, ranks.dp_rank,
            seed=mine.seed_ppo, seed_order=settings.run.seed_order, corpus=corpus,
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """The collection that steps are learning from (see Collection.state), the same on all ranks."""
        return self.collection.state() if self.collection.rollouts else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.collection = RolloutBuffer.from_state(state)

    def step(self, window: StepBatch) -> dict[str, float]:
        how, ranks = self.settings, self.context.ranks
        with window.timer("rollout"):
            groups = self.rollouts_of(window)
        rollouts = [stored for group in groups for stored in group]
        whitened = self.whitened(groups)
        batches, tokens = self.micro_batches(window, [stored.response for stored in rollouts])
        with window.timer("student"):
            texts = self.corpus_batches(window)
            losses = self.update(batches, texts, rollouts, whitened)
        pg, reg = losses["pg_loss"], losses["reg_loss"]
        lm, ds = losses.get("lm_loss", 0.0), losses.get("ds_loss", 0.0)
        rl = pg + reg if how.single_step_reg else pg
        pt = (1 - how.kd_ratio) * lm + how.kd_ratio * ds
        row = {"tot_loss": rl + how.lm_coef * pt, "rl_loss": rl, "pg_loss": pg, "reg_loss": reg}
        if texts:
            row |= {"pt_loss": pt, "lm_loss": lm, "ds_loss": ds}
        sums = torch.tensor([_statistics(stored, how) for stored in rollouts], dtype=torch.float64).sum(0)
        reward, rev_kl, stu_lens, mixed_lens, count = ranks.all_reduce_sum(sums.to(ranks.device)).tolist()
        means = {"reward": reward, "rev_kl": rev_kl, "stu_lens": stu_lens, "mixed_lens": mixed_lens}
        return {**row, **{name: value / count for name, value in means.items()}, "response_tokens": tokens}

    def rollouts_of(self, window: StepBatch) -> list[list[StoredRollout]]:
        """This rank's rollouts, micro-batch by micro-batch; draws a collection where one begins."""
        groups = []
        for number, places in self.context.windows.batches(window.step):
            if number != self.collection.number:
                self.collection = self.collect(number, window)
            groups.append([self.collection.rollouts[place] for place in places])
        return groups

    @torch.no_grad()
    def collect(self, number: int, window: StepBatch) -> RolloutBuffer:
        """Answer the collection's prompts, from the mixture and by the student alone, and weigh the answers."""
        how, context = self.settings, self.context
        rows, places = context.windows.collection(number), context.windows.mine()
        prompts = replace(window, examples=[context.data.train[rows[place]] for place in places])
        # Greedy rollouts are the student's own, as published: there the mixture exists in sampling alone.
        mixes = how.teacher_mixed_alpha > 0 and context.sampling.do_sample
        mix = TeacherMixture(self.teacher.module.model, how.teacher_mixed_alpha) if mixes else None
        keys = [(number, place) for place in places]
        mixed = self.rollout(prompts.examples, [(*key, 0) for key in keys], mix).responses
        own = mixed if mix is None else self.rollout(prompts.examples, [(*key, 1) for key in keys]).responses
        students, teachers = self.score(prompts, mixed)
        own_students, own_teachers = (students, teachers) if mix is None else self.score(prompts, own)
        stored = {}
        for i, place in enumerate(places):
            rewards = (teachers[i] - students[i]) / how.reward_scaling
            if how.cliprange_reward:
                rewards = rewards.clamp(-how.cliprange_reward, how.cliprange_reward)
            mixture = torch.lerp(students[i].exp(), teachers[i].exp(), how.teacher_mixed_alpha)
            difference = own_teachers[i] - own_students[i]
            kl = float((difference.exp() - 1 - difference).sum())
            importance = students[i].exp() / mixture
            stored[place] = StoredRollout(mixed[i], students[i], rewards, importance, kl, len(own[i]))
        return RolloutBuffer.gathered(number, stored, context.ranks)

    def score(self, prompts: StepBatch, responses: list[Tensor]) -> list[list[Tensor]]:
        """Log-probabilities of the responses' tokens under student and teacher: float32 [length] each."""
        batches, _ = self.micro_batches(prompts, responses)
        return [_log_probs(model, batches, responses) for model in (self.student, self.teacher)]

    def whitened(self, groups: list[list[StoredRollout]]) -> list[Tensor]:
        """Advantages of all rollouts, whitened over the step; with published means over each micro-batch."""
        limits, whitened = self.context.limits, []
        longest = limits.max_length - limits.max_prompt_length
        together = groups if self.context.published_mean else [[stored for group in groups for stored in group]]
        for group in together:
            raw = [advantages(stored.rewards, self.settings.gamma) for stored in group]
            padding = len(raw) * longest - sum(map(len, raw)) if self.settings.whiten == "published" else 0
            whitened += whiten(raw, padding, self.context.ranks)
        return whitened

    def corpus_batches(self, window: StepBatch) -> list[MicroBatch]:
        """The step's rows of the corpus, none where there is no corpus."""
        windows, corpus = self.context.windows.corpus, self.context.data.corpus
        if windows is None:
            return []
        texts = [corpus[row] for row in windows.indices(window.step)]
        return self.micro_batches(replace(window, examples=texts), [text.response for text in texts])[0]

    def update(
        self, batches: list[MicroBatch], texts: list[MicroBatch], rollouts: list[StoredRollout], whitened: list[Tensor]
    ) -> dict[str, float]:
        """Take one step of the student, without dropout, on rollouts and on texts of the corpus."""
        options, device = self.settings, self.context.ranks.device
        of_corpus = set(map(id, texts))

        def losses(batch: MicroBatch) -> dict[str, Term]:
            teacher = self.teacher.predict(batch)
            if id(batch) in of_corpus:
                return {
                    "lm_loss": CrossEntropy(batch.targets, options.lm_coef * (1 - options.kd_ratio)),
                    "ds_loss": ForwardKL(teacher, options.lm_coef * options.kd_ratio),
                }
            members = [rollouts[i] for i in batch.members]
            parts = [whitened[i] for i in batch.members], [m.old for m in members], [m.importance for m in members]
            columns = (torch.cat(part).to(device) for part in parts)
            return {
                "pg_loss": ClippedPolicy(batch.targets, *columns, options.cliprange),
                "reg_loss": ReverseKL(teacher, 1.0 if options.single_step_reg else 0.0),
            }

        self.student.train()  # All dropout rates are 0. Gradient checkpointing needs the mode.
        return self.student.update([*batches, *texts], losses)


def _check_rows(folder: str, model_path: str) -> None:
    """UserError when the corpus' rows have more tokens than the student has positions."""
    limit = getattr(load_config(model_path, "--model-path").get_text_config(), "max_position_embeddings", None)
    prefix = Path(folder) / "train_0"
    if limit is None or not prefix.with_name("train_0.idx").is_file():
        return
    longest = int(TokenFile(prefix).row_lengths().max())
    if longest > limit:
        raise UserError(
            f"--lm-data-dir {folder}: its rows have up to {longest} tokens, the student {limit} positions: make it "
            f"anew with tools/process_data.py corpus --max-length {limit}"
        )


def _log_probs(model: TrainEngine | FrozenModel, batches: list[MicroBatch], responses: list[Tensor]) -> list[Tensor]:
    """log p(token) of each response, on the CPU."""
    found: dict[int, Tensor] = {}
    for batch in batches:
        hidden = model.hidden_states(batch)
        with model.lm_head() as head:
            values = log_probs(FrozenLogits(hidden, head), batch.targets).cpu()
        found |= zip(batch.members, values.split([len(responses[i]) for i in batch.members]))
    return [found[i] for i in range(len(responses))]


def _statistics(stored: StoredRollout, how: Any) -> tuple[float, ...]:
    """reward, reverse KL, tokens of the student's own answer and of the rollout, 1: to be summed."""
    length, own_length = len(stored.response), stored.own_length
    per_token = (length, own_length) if how.length_norm else (1, 1)
    reward = float(returns(stored.rewards, how.gamma)[0])
    return reward / per_token[0], stored.own_kl / per_token[1], own_length, length, 1.0
