"""PromptKD as plain as it goes, by tests/golden/README.md: transformers and torch, one sequence at a time, no batches.

It shares no arithmetic with the project and, on GPT-2, meets the recording of the published code
(test_tensor_parallel.py), so that it can stand in for recordings of families of which there are none here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

NO_DECAY = ("bias", "ln_f.weight", "ln_1.weight", "ln_2.weight")


@dataclass
class Plain:
    """What `steps` returns: the losses of each step and what the student answered in it, token by token."""

    losses: list[dict[str, float]]
    answers: list[list[list[int]]]
    student: torch.nn.Module


def logits_of(model, prompt: list[int], answer: list[int], soft: Tensor | None = None) -> Tensor:
    """Of the positions that predict the answer: [answer tokens, vocabulary]."""
    tokens = model.get_input_embeddings()(torch.tensor([prompt + answer]))
    if soft is not None:
        tokens = torch.cat([soft[None], tokens], 1)
    return model(inputs_embeds=tokens, use_cache=False).logits[0, -len(answer) - 1 : -1]


def reverse_kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(ours || theirs) of each position."""
    log_p, log_q = F.log_softmax(ours, -1), F.log_softmax(theirs, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@torch.no_grad()
def greedy(model, prompt: list[int], most: int, end: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < most and (not answer or answer[-1] != end):
        answer.append(int(model(torch.tensor([prompt + answer]), use_cache=False).logits[0, -1].argmax()))
    return answer


def step_of(optimizer, parameters: list[Tensor], loss: Tensor, clip: float) -> float:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return loss.item()


def steps(student_path: Path, teacher_path: Path, prompts: list[list[int]], o: dict, total: int, run: int) -> Plain:
    """The first `run` steps of `total`. prompts: token ids, in the file's order. o: options of a golden case."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (student_path, teacher_path)
    )
    teacher.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(student_path)
    words = (tokenizer(o["prompt_init_text"])["input_ids"] * o["prompt_len"])[: o["prompt_len"]]
    soft = torch.nn.Parameter(teacher.get_input_embeddings().weight[words].clone())
    plain = [p for name, p in student.named_parameters() if any(part in name for part in NO_DECAY)]
    decayed = [p for name, p in student.named_parameters() if not any(part in name for part in NO_DECAY)]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    student_step = torch.optim.AdamW(groups, lr=o["lr"], weight_decay=o["weight_decay"])
    prompt_step = torch.optim.AdamW([soft], lr=o["teacher_lr"], weight_decay=o["weight_decay"])
    made, per_epoch = Plain([], [], student), len(prompts) // o["batch_size"]
    for step in range(1, run + 1):
        epoch, place = divmod(step - 1, per_epoch)
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(epoch)).tolist()
        rows = [prompts[i] for i in order[place * o["batch_size"] : (place + 1) * o["batch_size"]]]
        most, end = o["max_length"] - o["max_prompt_length"], tokenizer.eos_token_id
        pairs = [(prompt, greedy(student, prompt, most, end)) for prompt in rows]
        base = (1 - step / total) * o["base_coef"]
        with torch.no_grad():
            students = torch.cat([logits_of(student, *pair) for pair in pairs])
            teachers = torch.cat([logits_of(teacher, *pair) for pair in pairs])
        prompted = torch.cat([logits_of(teacher, *pair, soft) for pair in pairs])
        kd, to_base = reverse_kl(prompted, students).mean(), base * reverse_kl(prompted, teachers).mean()
        step_of(prompt_step, [soft], kd + to_base, o["clip_grad"])
        with torch.no_grad():
            prompted = torch.cat([logits_of(teacher, *pair, soft) for pair in pairs])
        loss = reverse_kl(torch.cat([logits_of(student, *pair) for pair in pairs]), prompted).mean()
        learned = step_of(student_step, list(student.parameters()), loss, o["clip_grad"])
        made.losses.append({"student_loss": learned, "prompt_kd_loss": kd.item(), "prompt_base_loss": to_base.item()})
        made.answers.append([answer for _, answer in pairs])
    return made
