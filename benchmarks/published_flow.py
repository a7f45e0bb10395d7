"""What one PromptKD (or KD) step costs in the published flow, emulated.

Emulates train_promptkd.py of gmkim-ai/PromptKD at 383182f on stock transformers: each micro-batch separately; prompts
padded on the left to 256, `generate` for both until the last has ended, then everything padded on the right to 512;
logits of all 512 positions from prompted teacher, teacher, student (twice) and updated teacher, in float32, with
softmax, log-softmax and masked products of that size; gradients accumulate over the micro-batches of a step.
KD (finetune.py there) is teacher-forced: the data's responses padded to 512, cross-entropy and the soft one of it.
Plain AdamW stands for DeepSpeed's wrapper around the same. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from promptkd.data.dataset import ExampleSet
from promptkd.data.sampler import StepSampler
from promptkd.models.loading import load_causal_lm, load_tokenizer
from promptkd.models.soft_prompt import initial_prompt

LONGEST, PROMPT = 512, 256


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("data")
    parser.add_argument("--method", choices=["promptkd", "kd"], default="promptkd")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=16)
    parser.add_argument("--seed", type=int, default=10)
    return parser.parse_args()


class Flow:
    def __init__(self, o: argparse.Namespace) -> None:
        self.tokenizer = load_tokenizer(o.student)
        self.student = load_causal_lm(o.student, torch.float32, "student")
        self.teacher = load_causal_lm(o.teacher, torch.float32, "teacher").requires_grad_(False)
        embedding = self.teacher.get_input_embeddings()
        start = initial_prompt("Suppose you are a student.", 7, embedding, self.tokenizer, 0)
        self.prompt = torch.nn.Parameter(start)
        self.optimizers = [torch.optim.AdamW([self.prompt]), torch.optim.AdamW(self.student.parameters(), lr=5e-5)]
        self.tokens = 0

    def sample(self, prompts: list) -> tuple[Tensor, Tensor, Tensor]:
        """ids and attention mask [batch, 512] padded on the right, labels with -100 where nothing is learnt."""
        eos = self.tokenizer.eos_token_id
        ids = torch.full((len(prompts), PROMPT), eos)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.as_tensor(prompt), 1
        self.student.eval()
        out = self.student.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=LONGEST - PROMPT, pad_token_id=eos
        )[:, PROMPT:]
        responses = []
        for row in range(len(prompts)):
            response = F.pad(out[row], (0, LONGEST - PROMPT - len(out[row])), value=eos)
            response[-1] = eos
            responses.append(response[: int((response == eos).nonzero()[0]) + 1])
        return self.padded(prompts, responses)

    def padded(self, prompts: list, responses: list) -> tuple[Tensor, Tensor, Tensor]:
        """ids, attention mask and labels [batch, 512], padded on the right with end-of-text."""
        full = torch.full((len(prompts), LONGEST), self.tokenizer.eos_token_id)
        seen, labels = torch.zeros_like(full), torch.full_like(full, -100)
        for row, (prompt, response) in enumerate(zip(prompts, responses)):
            sequence = torch.cat([torch.as_tensor(prompt), response])
            full[row, : len(sequence) - 1], seen[row, : len(sequence) - 1] = sequence[:-1], 1
            labels[row, len(prompt) - 1 : len(sequence) - 1] = response
            self.tokens += len(response)
        return full, seen, labels

    def prompted(self, ids: Tensor, mask: Tensor) -> Tensor:
        tokens = self.teacher.get_input_embeddings()(ids)
        given = torch.cat([self.prompt.expand(len(ids), -1, -1), tokens], 1)
        mask = torch.cat([mask.new_ones(len(ids), len(self.prompt)), mask], 1)
        return self.teacher(inputs_embeds=given, attention_mask=mask, use_cache=False).logits[:, len(self.prompt) :]

    def kd_micro_batch(self, examples: list) -> None:
        ids, mask, labels = self.padded([e.prompt for e in examples], [torch.as_tensor(e.response) for e in examples])
        self.student.train()
        logits = self.student(ids, attention_mask=mask, use_cache=False).logits
        lm = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        with torch.no_grad():
            teacher = self.teacher(ids, attention_mask=mask, use_cache=False).logits
        probs, log_probs = F.softmax(teacher, -1, dtype=torch.float32), F.log_softmax(logits, -1, dtype=torch.float32)
        products = torch.masked_fill(probs * log_probs, torch.isinf(logits), 0).sum(-1).flatten()
        kept = (labels != -100).flatten().int()
        (0.5 * lm - 0.5 * (products * kept).sum() / kept.sum()).backward()

    def micro_batch(self, examples: list) -> None:
        prompts = [example.prompt for example in examples]
        with torch.no_grad():
            ids, mask, labels = self.sample(prompts)
        self.teacher.train()
        logits = self.prompted(ids, mask)
        with torch.no_grad():
            base = self.teacher.eval()(ids, attention_mask=mask, use_cache=False).logits
            student = self.student(ids, attention_mask=mask, use_cache=False).logits
        (reverse_kl(logits, base, labels) + reverse_kl(logits, student, labels)).backward()
        self.student.train()
        logits = self.student(ids, attention_mask=mask, use_cache=False).logits
        with torch.no_grad():
            teacher = self.prompted(ids, mask)
        reverse_kl(logits, teacher, labels).backward()

    def step(self, window: list[list], method: str) -> None:
        for examples in window:
            self.kd_micro_batch(examples) if method == "kd" else self.micro_batch(examples)
        for optimizer in self.optimizers[method == "kd" :]:
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad()


def reverse_kl(logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    probs = F.softmax(logits, dim=-1, dtype=torch.float32)
    target_part = torch.masked_fill(probs * F.log_softmax(target, dim=-1, dtype=torch.float32), torch.isinf(target), 0)
    own_part = torch.masked_fill(probs * F.log_softmax(logits, dim=-1, dtype=torch.float32), torch.isinf(logits), 0)
    kept = (labels != -100).view(-1).int()
    return (torch.sum(own_part - target_part, dim=-1).view(-1) * kept).sum() / kept.sum()


def main() -> None:
    o = options()
    torch.manual_seed(o.seed)
    flow = Flow(o)
    examples = ExampleSet.open(o.data, "train", flow.tokenizer, PROMPT, LONGEST)
    windows = StepSampler(len(examples), o.batch_size, o.accumulation, seed=o.seed)
    seconds, tokens = [], []
    for step in range(1, o.steps + 1):
        rows = [examples[row] for row in windows.indices(step)]
        began, before = time.perf_counter(), flow.tokens
        flow.step([rows[i : i + o.batch_size] for i in range(0, len(rows), o.batch_size)], o.method)
        seconds.append(time.perf_counter() - began)
        tokens.append(flow.tokens - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"seconds_per_step": seconds, "response_tokens_per_step": tokens, "peak_rss_gb": peak}))


if __name__ == "__main__":
    main()
