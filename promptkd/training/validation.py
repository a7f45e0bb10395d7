"""The dev set during training: loss on the gold responses, ROUGE-L of sampled answers, and exposure bias."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from promptkd.config.options import RougeTokenizer
from promptkd.data.batching import make_micro_batches
from promptkd.data.dataset import Example, ExampleSet
from promptkd.distributed.ranks import Ranks
from promptkd.engine.engine import FrozenModel, TrainEngine
from promptkd.evaluation.exposure_bias import Protocol, accumulated_errors, curves
from promptkd.evaluation.rouge import rouge_l
from promptkd.generation.answers import decode_share, gather_texts
from promptkd.generation.budget import decoding_budget
from promptkd.generation.sampling import Sampling
from promptkd.losses import CrossEntropy, fused_loss
from promptkd.methods.context import LengthLimits
from promptkd.models.wrapper import LanguageModel


class DevSet:
    """Measure a student on the dev examples, which are distributed over ranks by index.

    Args:
        examples: The dev examples. None for no dev set.
        tokenizer: The student's tokenizer.
        sampling: How answers are sampled.
        limits: Lengths and token budgets.
        batch_size: Examples of a batch in the published mean.
        seed: The seed of sampling.
        ranks: The ranks of the run.
        published_mean: Whether the loss is the published mean of the batches' means.
        rouge_tokenizer: The tokenizer of ROUGE-L.
    """

    def __init__(
        self,
        examples: ExampleSet | None,
        tokenizer: Any,
        sampling: Sampling,
        limits: LengthLimits,
        batch_size: int,
        seed: int,
        ranks: Ranks,
        published_mean: bool,
        rouge_tokenizer: RougeTokenizer,
    ) -> None:
        self.examples, self.tokenizer, self.sampling, self.limits = examples, tokenizer, sampling, limits
        self.batch_size, self.seed, self.ranks, self.published_mean = batch_size, seed, ranks, published_mean
        self.rouge_tokenizer = rouge_tokenizer

    def __len__(self) -> int:
        return 0 if self.examples is None else len(self.examples)

    def loss(self, student: TrainEngine) -> float:
        """Return the mean cross-entropy over response tokens, or the published mean of the batches' means.

        The published code deals examples to ranks in turn, batches them, and averages over batches and ranks.
        """
        student.train(False)
        examples = self._examples()[self.ranks.dp_rank :: self.ranks.dp_size]
        batches = [examples[i : i + self.batch_size] for i in range(0, len(examples), self.batch_size)]
        sums = torch.zeros(2, dtype=torch.float64)
        with student.gathered_model() as model, torch.no_grad():
            for batch in batches:
                total, tokens = self._batch_loss(student, batch)
                sums += torch.tensor([total / max(tokens, 1), 1.0] if self.published_mean else [total, tokens])
        total, count = self.ranks.all_reduce_sum(sums).tolist()
        del model
        return total / max(count, 1)

    def _examples(self, count: int | None = None) -> list[Example]:
        """Return the first `count` examples, by default all."""
        examples = self.examples
        return [] if examples is None else [examples[i] for i in range(len(examples))[:count]]

    def _batch_loss(self, student: TrainEngine, examples: list[Example]) -> tuple[float, int]:
        """Return the sum of the loss over the examples' response tokens, and their number."""
        prompts: list[Any] = [each.prompt for each in examples]
        responses: list[Any] = [each.response for each in examples]
        losses, weights = [], [1.0] * len(examples)
        for batch in make_micro_batches(prompts, responses, weights, self.limits.token_budget, self.ranks.device):
            loss, _ = student.module(
                batch, lambda h, head, b=batch: fused_loss(h, head, [CrossEntropy(b.targets)], b.token_weights)
            )
            losses.append(loss)
        return sum(torch.stack(losses).tolist()), sum(map(len, responses))

    def rouge_l(self, student: TrainEngine) -> float:
        """Return the mean ROUGE-L x 100 of one sampled answer for each dev prompt."""
        limits = self.limits
        prompts = [each.prompt for each in self._examples()]
        with student.gathered_model() as model:
            batches = decode_share(
                model,
                prompts,
                [self.seed],
                max_new_tokens=limits.max_length - limits.max_prompt_length,
                end_ids=limits.end_ids,
                sampling=self.sampling,
                token_budget=self._budget(model),
                ranks=self.ranks,
            )
            answers = gather_texts(batches, self.tokenizer, prompts, 1, self.ranks)[0]
        pairs = zip(answers, self.examples.references if self.examples is not None and self.examples.references else [])
        scores = [rouge_l(text, references, self.rouge_tokenizer) for text, references in pairs]
        return sum(scores) / max(len(scores), 1)

    def _budget(self, model: PreTrainedModel) -> int:
        """Return the token budget of a decoding batch."""
        limits = self.limits
        return decoding_budget([model], limits.max_length, self.ranks, limits.rollout_token_budget)

    def exposure_bias(self, student: TrainEngine, teacher: TrainEngine | FrozenModel, rows: int) -> dict[str, Any]:
        """Measure exposure bias on the first `rows` dev prompts, against the teacher without a soft prompt.

        All methods are therefore measured alike. A tuned prompt has been brought close to its student.

        Returns:
            The values at the last position, and ex_acc_err at all positions as `curve`.
        """
        limits = self.limits
        prompts = [each.prompt for each in self._examples(rows)]
        with student.gathered_model(), teacher.gathered_model():
            protocol = Protocol(
                max_new_tokens=limits.max_length - limits.max_prompt_length,
                end_ids=limits.end_ids,
                sampling=self.sampling,
                samples=1,
                seed=self.seed,
                token_budget=min(self._budget(each.module.model) for each in (student, teacher)),  # they decode in turn
                forward_budget=limits.token_budget,
            )
            plain = LanguageModel(teacher.module.model, shared=teacher.module.shared)
            errors = accumulated_errors(student.module, plain, prompts, protocol, self.ranks)
        values = curves(errors, self.seed)
        names = ("ex_acc_err", "ex_acc_err_low", "ex_acc_err_high", "mean_R", "mean_eps")
        return {name: values[name][-1] for name in names} | {"rows": len(prompts), "curve": values["ex_acc_err"]}
