#!/usr/bin/env python
"""Make the world of the small study: instruction data, a tokenizer, and a teacher and three students without training.

    python -m tools.make_world --save results/study/world

writes below --save: teacher_data/{train,valid}.jsonl, data/{train,valid}.jsonl, five test sets below test/ and
models/{teacher,small,medium,large}. The same options give the same bytes. No instruction of the students' data, the
dev set and the test sets occurs twice.

The teacher's rows have all tasks, all wordings and long lists. The students' rows are fewer and narrower: they lack
the tasks HELD_OUT, the last wording of each task, and lists of more than four words. The test sets are

    test           tasks, wordings and lengths of the students' rows
    wordings       the wording of each task that the students' rows lack
    mix            mostly the tasks HARD, which are rare in the students' rows
    long           lists of five words
    held_out       the tasks that the students' rows lack
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.errors import UserError, exit_with
from promptkd.utils.files import atomic_files
from tools.world_tasks import ALL, HARD, HELD_OUT, KNOWN, LONG, SHORT, TASKS, Lengths, Task, who_has

if TYPE_CHECKING:  # transformers takes seconds to import, and wrong options are found before
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# A word is a token, so that sequences are short.
PROMPT = "{preamble}{instruction} -> "
# A teacher that never saw a text before the instruction cannot read behind a soft prompt.
PREAMBLES = [
    "Suppose you are a student. ",
    "Suppose you are a teacher. ",
    "You are a good teacher and this is a short test . ",
    "Please answer . ",
    "Be short and clear . ",
    "Read this first . ",
    "Here is a task . ",
]
END, UNKNOWN = "<|endoftext|>", "<|unknown|>"
POSITIONS = 96
SIZES = {
    "teacher": dict(num_hidden_layers=4, hidden_size=192, intermediate_size=512),
    "small": dict(num_hidden_layers=2, hidden_size=72, intermediate_size=192),
    "medium": dict(num_hidden_layers=3, hidden_size=96, intermediate_size=256),
    "large": dict(num_hidden_layers=4, hidden_size=112, intermediate_size=304),
}
# Llama, because tiny models learn to copy words much sooner with rotary positions than with learned ones.
START = dict(num_attention_heads=4, initializer_range=0.05, tie_word_embeddings=True)


@dataclass
class WorldSettings:
    """The options of this script."""

    save: str = option("results/study/world", "output folder")
    seed: int = option(1, "seed of data and weights")
    teacher_num: int = option(60000, "number of training examples of the teacher")
    train_num: int = option(2000, "number of training examples of the students")
    dev_num: int = option(400, "number of dev examples")
    test_num: int = option(300, "number of examples of each test set")

    def __post_init__(self) -> None:
        if not self.save:
            raise UserError("--save is empty: name a folder")
        numbers = dict(teacher_num=self.teacher_num, train_num=self.train_num, dev_num=self.dev_num)
        at_least(1, test_num=self.test_num, **numbers)
        if max(self.test_num, *numbers.values()) > 200_000:
            raise UserError("--teacher-num, --train-num, --dev-num or --test-num is over 200,000: lower it")


class Writer:
    """Write rows that no earlier call has written."""

    def __init__(self, seed: int) -> None:
        self.rng, self.seen = random.Random(seed), set[str]()

    def rows(
        self, number: int, tasks: list[Task], wordings: tuple[int, ...], lengths: Lengths, alternatives: bool = True
    ) -> list[dict[str, object]]:
        """Return `number` rows of the tasks in turn, with all right answers or with one of them."""
        rows: list[dict[str, object]] = []
        for attempt in range(20 * number):
            if len(rows) == number:
                break
            task = tasks[attempt % len(tasks)]
            texts, answers = task(self.rng, lengths)
            instruction = texts[self.rng.choice(wordings)]
            if instruction not in self.seen:
                self.seen.add(instruction)
                output = answers if alternatives and len(answers) > 1 else answers[0]
                rows.append({"task": task.__name__, "instruction": instruction, "output": output})
        if len(rows) < number:
            raise UserError(f"the tasks have no {number} different instructions: lower --teacher-num")
        return rows


def with_prompt(row: dict[str, object], preamble: str = "") -> dict[str, object]:
    """Add the ready prompt to a row. train.py and evaluate.py prefer it to the published template."""
    return {**row, "prompt": PROMPT.format(preamble=preamble, instruction=row["instruction"])}


def make_data(settings: WorldSettings) -> dict[str, list[dict[str, object]]]:
    """Return the rows of each file below --save. The teacher's training rows are drawn last."""
    writer, number = Writer(settings.seed), settings.test_num
    known, every = (0, 1), (0, 1, 2)
    mixed, lists = HARD * 3 + KNOWN, [task for task in KNOWN if task is not who_has]
    files = {
        "test/test/valid": writer.rows(number, KNOWN, known, SHORT),
        "test/wordings/valid": writer.rows(number, KNOWN, (2,), SHORT),
        "test/mix/valid": writer.rows(number, mixed, known, SHORT),
        "test/long/valid": writer.rows(number, lists, known, LONG),
        "test/held_out/valid": writer.rows(number, HELD_OUT, known, SHORT),
        "data/valid": writer.rows(settings.dev_num, KNOWN, known, SHORT),
        "data/train": writer.rows(settings.train_num, KNOWN, known, SHORT, alternatives=False),
        "teacher_data/valid": writer.rows(settings.dev_num, TASKS, every, ALL),
    }
    files = {name: [with_prompt(row) for row in rows] for name, rows in files.items()}
    rows = writer.rows(settings.teacher_num, TASKS, every, ALL, alternatives=False)
    preambles = [writer.rng.choice(PREAMBLES) if writer.rng.random() < 0.3 else "" for _ in rows]
    own = files["data/train"]  # the teacher knows the students' rows, as after training on more of the same data
    return {**files, "teacher_data/train": [*own, *(with_prompt(row, text) for row, text in zip(rows, preambles))]}


def make_tokenizer(rows: list[dict[str, object]]) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are the words of the rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = (f"{row['prompt']} {row['output']}" for row in rows)
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: number for number, word in enumerate([END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, unk_token=UNKNOWN)


def make_model(shape: dict[str, Any], tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Make a model with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    shape = {"max_position_embeddings": POSITIONS, **START, **shape}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **shape))


def main() -> None:
    """Make data and models."""
    settings = parse(
        {"options": WorldSettings}, sys.argv[1:], "make_world.py", dry_run=False, description=__doc__
    ).options
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which warns that there is no GPU
    save, data = Path(settings.save), make_data(settings)
    for name, rows in data.items():
        path = save / f"{name}.jsonl"
        with atomic_files(path.parent) as folder:
            (folder / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")
    tokenizer = make_tokenizer(data["teacher_data/train"])
    for number, (name, shape) in enumerate(SIZES.items()):
        model = make_model(shape, tokenizer, settings.seed + number)
        with atomic_files(save / "models" / name) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        print(f"{save}/models/{name}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    exit_with(main)
