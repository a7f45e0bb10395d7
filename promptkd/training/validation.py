"""The dev set during training: loss on the gold responses, ROUGE-L of sampled answers."""

from __future__ import annotations

from typing import Any

import torch

from promptkd.config.options import RougeTokenizer
from promptkd.data.batching import make_micro_batches
from promptkd.data.dataset import ExampleSet
from promptkd.distributed.ranks import Ranks
from promptkd.engine.engine import FrozenModel, TrainEngine
from promptkd.evaluation.exposure_bias import Protocol, accumulated_errors, curves
from promptkd.evaluation.rouge import rouge_l
from promptkd.generation.answers import decode_share, gather_texts
from promptkd.generation.budget import decoding_budget
from promptkd.generation.sampling import Sampling
from promptkd.losses import CrossEntropy, fused_loss
from promptkd.methods.base import LengthLimits


class DevSet:
    """Dev examples, shared out over ranks by row number."""

    def __init__(
        self,
        examples: ExampleSet | None,
        tokenizer,
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
        """Mean cross-entropy over response tokens, or the published mean of the batches' means.

        The published code deals rows to ranks in turn, batches them, and averages over batches and ranks.
        """
        student.train(False)
        rows = list(range(len(self)))[self.ranks.dp_rank :: self.ranks.dp_size]
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        sums = torch.zeros(2, dtype=torch.float64)
        with student.gathered_model() as model, torch.no_grad():
            for batch in batches:
                total, tokens = self._batch_loss(student, batch)
                sums += torch.tensor([total / max(tokens, 1), 1.0] if self.published_mean else [total, tokens])
        total, count = self.ranks.all_reduce_sum(sums.to(self.ranks.device)).tolist()
        del model
        return total / max(count, 1)

    def _batch_loss(self, student: TrainEngine, rows: list[int]) -> tuple[float, int]:
        examples = [self.examples[row] for row in rows]
        prompts, responses = [e.prompt for e in examples], [e.response for e in examples]
        total = 0.0
        for batch in make_micro_batches(
            prompts, responses, [1.0] * len(rows), self.limits.token_budget, self.ranks.device
        ):
            loss, _ = student.module(
                batch, lambda h, head, b=batch: fused_loss(h, head, [CrossEntropy(b.targets)], b.token_weights)
            )
            total += float(loss)
        return total, sum(map(len, responses))

    def rouge_l(self, student: TrainEngine) -> float:
        """ROUGE-L x 100 of one sampled answer for each dev prompt, mean over rows."""
        limits = self.limits
        with student.gathered_model() as model:
            prompts = [self.examples[row].prompt for row in range(len(self))]
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
        pairs = zip(answers, self.examples.references)
        scores = [rouge_l(text, references, self.rouge_tokenizer) for text, references in pairs]
        return sum(scores) / max(len(scores), 1)

    def _budget(self, model) -> int:
        limits = self.limits
        return decoding_budget([model], limits.max_length, self.ranks, limits.rollout_token_budget)

    def exposure_bias(self, student: TrainEngine, teacher: TrainEngine | FrozenModel, rows: int) -> dict[str, Any]:
        """Exposure bias on the first `rows` dev prompts, against the teacher with its prompt if it has one.

        The values at the last position, and ex_acc_err at all positions as `curve` (evaluation/exposure_bias.py).
        """
        limits = self.limits
        prompts = [self.examples[row].prompt for row in range(min(rows, len(self)))]
        with student.gathered_model(), teacher.gathered_model():
            protocol = Protocol(
                max_new_tokens=limits.max_length - limits.max_prompt_length,
                end_ids=limits.end_ids,
                sampling=self.sampling,
                samples=1,
                seed=self.seed,
                token_budget=min(self._budget(each.module.model) for each in (student, teacher)),  # in turn
                forward_budget=limits.token_budget,
            )
            errors = accumulated_errors(student.module, teacher.module, prompts, protocol, self.ranks)
        found = curves(errors, self.seed)
        names = ("ex_acc_err", "ex_acc_err_low", "ex_acc_err_high", "mean_R", "mean_eps")
        return {name: found[name][-1] for name in names} | {"rows": len(prompts), "curve": found["ex_acc_err"]}
