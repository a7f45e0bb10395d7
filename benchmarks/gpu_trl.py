"""Steps of TRL's DistillationTrainer on random models: on-policy reverse KL without a soft prompt.

    python benchmarks/gpu_trl.py STUDENT TEACHER [--steps 4] [--batch 32] [--new 256] [--precision bf16]

Prints one JSON line: seconds, seconds of generation and response tokens of each step, and the peak memory in GB.
TRL keeps the student in float32 and computes with autocast, which is how its trainers run in bf16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from gpu_common import prompt_texts
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


class TimedTrainer(DistillationTrainer):
    """Also measures generation, which happens inside of the first micro-batch of a step."""

    generations: list[float]
    tokens: list[int]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        torch.cuda.synchronize()
        began = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        torch.cuda.synchronize()
        self.generations.append(time.perf_counter() - began)
        self.tokens.append(int(output["completion_mask"].sum()))
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--precision", choices=["bf16", "fp16"], default="bf16")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    clock = Clock()
    config = DistillationConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.batch, gradient_accumulation_steps=1,
        max_steps=args.steps, max_completion_length=args.new, learning_rate=5e-5, lr_scheduler_type="constant",
        beta=1.0, temperature=1.0, top_p=1.0, top_k=0, gradient_checkpointing=False, save_strategy="no",
        logging_strategy="no", report_to=[], dataloader_num_workers=0, disable_tqdm=True,
        bf16=args.precision == "bf16", fp16=args.precision == "fp16",
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "bfloat16" if args.precision == "bf16" else "float16"},
    )  # fmt: skip
    trainer = TimedTrainer(
        model=str(args.student), teacher_model=str(args.teacher), args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompt_texts(args.batch * args.steps)}), callbacks=[clock],
    )  # fmt: skip
    trainer.generations, trainer.tokens = [], []
    trainer.train()
    told = {"seconds": clock.seconds, "generation_seconds": trainer.generations, "tokens": trainer.tokens}
    print(json.dumps({**told, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}))


if __name__ == "__main__":
    main()
