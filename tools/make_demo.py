#!/usr/bin/env python
"""Make the demo's instruction data, its tokenizer, and a teacher and a student with random weights.

    python tools/make_demo.py --save results/demo

writes below --save: {teacher_data,data}/{train,valid}.jsonl and test/valid.jsonl, the layout that train.py and
evaluate.py read, and models/{teacher,student}. Rows are {"task", "instruction", "output", "prompt"}. The same
options give the same bytes. Train, dev and test have no instruction in common. The students see a part of the
teacher's rows, so that the teacher knows more than their data, as after pre-training.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.errors import UserError, exit_with
from promptkd.utils.files import atomic_files

if TYPE_CHECKING:  # transformers takes seconds to import, and wrong options are found before
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Without the long preamble of the published template: a tiny model on a CPU would spend most of its time on it.
PROMPT = "{preamble}### Instruction:\n{instruction}\n\n### Response:\n"
# A teacher that never saw a text before the instruction cannot read behind a soft prompt. Therefore half of its rows
# begin with one of these. A pre-trained teacher has read far more than that.
PREAMBLES = [
    "Suppose you are a student.",
    "Suppose you are a teacher.",
    "You are a good teacher and this is a short test.",
    "Please answer.",
    "Be short and clear.",
    "Read this first, then write the answer.",
    "Here is a task.",
]
END = "<|endoftext|>"
POSITIONS = 128
SIZES = {"teacher": dict(n_layer=3, n_embd=128, n_head=4), "student": dict(n_layer=2, n_embd=64, n_head=2)}
# GPT-2's 0.02 suits models ten times as wide; no dropout, since no row is seen more than a few times.
START = dict(initializer_range=0.08, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)

_KINDS = {
    "animal": "cat dog fox hen pig cow bee owl goat bear mouse snail",
    "colour": "red blue green black white pink brown gold grey",
    "food": "plum corn rice bread cake pear bean jam nut",
    "tool": "saw nail pen rope hook lamp broom spoon key",
    "place": "town lake hill park moon road house well shop",
}
_RHYMES = (
    "cat hat bat mat rat, hen pen ten men den, dog log fog frog jog, lake cake snake rake wake, "
    "moon spoon noon soon tune, nail snail tail mail sail, house mouse blouse, pear bear chair hair, "
    "town brown crown down, goat boat coat note"
)
_OPPOSITES = (
    "hot cold, big small, fast slow, old new, wet dry, hard soft, high low, open shut, early late, "
    "near far, full empty, loud quiet, good bad, rich poor, sweet sour, light dark"
)
KINDS = {kind: words.split() for kind, words in _KINDS.items()}
RHYMES = [family.split() for family in _RHYMES.split(", ")]
OPPOSITES = [tuple(pair.split()) for pair in _OPPOSITES.split(", ")]
NAMES = ("Anna", "Tom", "Eva", "Max", "Lena", "Paul", "Mia", "Ben", "Rosa", "Jan")
THINGS = ("hat", "ball", "book", "coat", "boat", "lamp", "cake", "pen", "key", "drum")
ORDINALS = ("first", "second", "third", "fourth")
TIMES = ("once", "twice", "three times", "four times", "five times")
ALL_WORDS = sorted({word for words in KINDS.values() for word in words})
Task = Callable[[random.Random], tuple[str, str]]  # -> instruction, response


def repeat(rng: random.Random) -> tuple[str, str]:
    words = some(rng, ALL_WORDS, 3, 5)
    return f"Repeat these words: {words}", words


def reverse(rng: random.Random) -> tuple[str, str]:
    words = some(rng, ALL_WORDS, 3, 5)
    return f"Write these words in reverse order: {words}", " ".join(reversed(words.split()))


def pick_position(rng: random.Random) -> tuple[str, str]:
    words, place = some(rng, ALL_WORDS, 4, 5), rng.randrange(len(ORDINALS))
    return f"What is the {ORDINALS[place]} word: {words}", f"The {ORDINALS[place]} word is {words.split()[place]}."


def count(rng: random.Random) -> tuple[str, str]:
    word, other = rng.sample(ALL_WORDS, 2)
    times = rng.randint(1, 5)
    words = [word] * times + [other] * rng.randint(1, 6 - times)
    rng.shuffle(words)
    return f"How often is {word} in this list: {' '.join(words)}", f"{word} is there {TIMES[times - 1]}."


def replace(rng: random.Random) -> tuple[str, str]:
    words, new = some(rng, ALL_WORDS, 3, 4).split(), rng.choice(ALL_WORDS)
    old = rng.choice(words)
    return f"Replace {old} by {new}: {' '.join(words)}", " ".join(new if word == old else word for word in words)


def sort_numbers(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(10, 100), rng.randint(3, 4))
    shown = " ".join(map(str, numbers))
    return f"Sort from small to large: {shown}", " ".join(map(str, sorted(numbers)))


def add(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(10, 99), rng.randint(1, 50)
    return f"What is {left} plus {right}?", f"{left} plus {right} is {left + right}."


def compare(rng: random.Random) -> tuple[str, str]:
    (one, other), (left, right) = rng.sample(NAMES, 2), rng.sample(range(10, 100), 2)
    older, younger = (one, other) if left > right else (other, one)
    return f"{one} is {left} and {other} is {right}. Who is older?", f"{older} is older than {younger}."


def find_kind(rng: random.Random) -> tuple[str, str]:
    kinds = rng.sample(sorted(KINDS), 4)
    words = [rng.choice(KINDS[kind]) for kind in kinds]
    place = rng.randrange(len(kinds))
    return f"Which of these is the {kinds[place]}: {' '.join(words)}", f"The {kinds[place]} is {words[place]}."


def find_rhyme(rng: random.Random) -> tuple[str, str]:
    families = rng.sample(RHYMES, 4)
    word, rhyme = rng.sample(families[0], 2)
    words = [rhyme, *(rng.choice(family) for family in families[1:])]
    rng.shuffle(words)
    return f"Which word rhymes with {word}: {' '.join(words)}", f"{rhyme} rhymes with {word}."


def opposites(rng: random.Random) -> tuple[str, str]:
    pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in rng.sample(OPPOSITES, rng.randint(2, 4))]
    return f"Give the opposites: {' '.join(a for a, _ in pairs)}", " ".join(b for _, b in pairs)


def who_has(rng: random.Random) -> tuple[str, str]:
    names, colours, things = rng.sample(NAMES, 2), rng.sample(KINDS["colour"], 2), rng.sample(THINGS, 2)
    facts = [f"{name} has a {colour} {thing}" for name, colour, thing in zip(names, colours, things)]
    place = rng.randrange(2)
    if rng.random() < 0.5:
        return f"{facts[0]} and {facts[1]}. Who has the {things[place]}?", f"{names[place]} has the {things[place]}."
    question = f"What colour is the {things[place]}?"
    return f"{facts[0]} and {facts[1]}. {question}", f"The {things[place]} is {colours[place]}."


def some(rng: random.Random, words: list[str], least: int, most: int) -> str:
    return " ".join(rng.sample(words, rng.randint(least, most)))


TASKS: list[Task] = [
    repeat, reverse, pick_position, count, replace, sort_numbers, add, compare, find_kind, find_rhyme, opposites,
    who_has,
]  # fmt: skip


MOST_ROWS = 1_000_000  # more different instructions than the tasks have


@dataclass
class DemoSettings:
    """The options of this script."""

    save: str = option("results/demo", "output folder")
    seed: int = option(1, "seed of data and weights")
    teacher_num: int = option(20000, "number of training examples of the teacher")
    train_num: int = option(1000, "number of training examples of the students, the first of the teacher's")
    dev_num: int = option(240, "number of dev examples, for the evaluations during training")
    test_num: int = option(480, "number of test examples, for the evaluation at the end")
    vocab_size: int = option(1024, "vocabulary size of the byte-level BPE tokenizer")
    models: bool = option(True, "also make tokenizer and models. --no-models makes only data")

    def __post_init__(self) -> None:
        if max(self.teacher_num, self.test_num, self.dev_num) > MOST_ROWS or not self.save:
            raise UserError(f"--teacher-num, --dev-num or --test-num is over {MOST_ROWS}, or --save is empty")
        at_least(1, train_num=self.train_num, dev_num=self.dev_num, test_num=self.test_num)
        at_least(self.train_num, teacher_num=self.teacher_num)
        at_least(257, vocab_size=self.vocab_size)  # 256 bytes and end-of-text


def make_rows(number: int, seed: int) -> list[dict[str, str]]:
    """Return `number` rows {"task", "instruction", "output"} of all tasks in turn, no instruction twice."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    for _ in range(20 * number):
        if len(rows) == number:
            break
        task = TASKS[len(rows) % len(TASKS)]
        instruction, output = task(rng)
        rows.setdefault(instruction, {"task": task.__name__, "instruction": instruction, "output": output})
    else:
        raise UserError(f"{task.__name__} has no {number // len(TASKS)} different instructions: lower --teacher-num")
    return list(rows.values())


def with_prompt(row: dict[str, str], preamble: str = "") -> dict[str, str]:
    """Add the ready prompt to a row. train.py and evaluate.py prefer it to the published template."""
    return {**row, "prompt": PROMPT.format(preamble=preamble, instruction=row["instruction"])}


def make_data(settings: DemoSettings) -> dict[str, list[dict[str, str]]]:
    """Return the rows of each file below --save. Test and dev rows do not depend on the number of training rows."""
    test, dev = settings.test_num, settings.test_num + settings.dev_num
    rows = make_rows(dev + settings.teacher_num, settings.seed)
    rng = random.Random(settings.seed + 1)
    preambles = [rng.choice(PREAMBLES) + "\n\n" if rng.random() < 0.5 else "" for _ in rows[dev:]]
    plain = [with_prompt(row) for row in rows]
    return {
        "teacher_data/train": [with_prompt(row, preamble) for row, preamble in zip(rows[dev:], preambles)],
        "teacher_data/valid": plain[test:dev],
        "data/train": plain[dev : dev + settings.train_num],
        "data/valid": plain[test:dev],
        "test/valid": plain[:test],
    }


def train_tokenizer(rows: list[dict[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with single digits."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((row["prompt"] + row["output"] for row in rows), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, unk_token=END)


def make_model(family: str, shape: dict[str, Any], tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Make a model of a family and shape with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **shape)
    return AutoModelForCausalLM.from_config(config)


def write_rows(data: dict[str, list[dict[str, Any]]], save: Path) -> None:
    """Write the rows of each file below `save`."""
    for name, rows in data.items():
        path = save / f"{name}.jsonl"
        with atomic_files(path.parent) as folder:
            (folder / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


def write_models(
    family: str, shapes: dict[str, dict[str, Any]], tokenizer: PreTrainedTokenizerFast, seed: int, save: Path
) -> None:
    """Write a model of each shape, with the tokenizer, to a folder below `save`."""
    for number, (name, shape) in enumerate(shapes.items()):
        model = make_model(family, shape, tokenizer, seed + number)
        with atomic_files(save / name) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        print(f"{save / name}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


def main() -> None:
    """Make data and models."""
    settings = parse(
        {"options": DemoSettings}, sys.argv[1:], "make_demo.py", dry_run=False, description=__doc__
    ).options
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which warns that there is no GPU
    save, data = Path(settings.save), make_data(settings)
    write_rows(data, save)
    if settings.models:
        tokenizer = train_tokenizer(data["teacher_data/train"], settings.vocab_size)
        shapes = {name: {"n_positions": POSITIONS, **START, **size} for name, size in SIZES.items()}
        write_models("gpt2", shapes, tokenizer, settings.seed, save / "models")


if __name__ == "__main__":
    exit_with(main)
