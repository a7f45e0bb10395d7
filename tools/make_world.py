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

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from promptkd.config.parser import parse
from promptkd.config.values import at_least, option
from promptkd.errors import UserError, exit_with
from tools.make_demo import write_models, write_rows

if TYPE_CHECKING:  # transformers takes seconds to import, and wrong options are found before
    from transformers import PreTrainedTokenizerFast

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

_KINDS = {
    "animal": "cat dog fox hen pig cow bee owl goat bear",
    "color": "red blue green black white pink brown gold grey violet",
    "food": "plum corn rice bread cake pear bean jam nut soup",
    "tool": "saw nail pen rope hook lamp broom spoon key drill",
    "place": "town lake hill park moon road house well shop barn",
}
_OPPOSITES = (
    "hot cold, big small, fast slow, old new, wet dry, hard soft, high low, open shut, early late, near far, "
    "full empty, loud quiet, good bad, rich poor, sweet sour, light dark"
)
KINDS = {kind: words.split() for kind, words in _KINDS.items()}
OPPOSITES = [tuple(pair.split()) for pair in _OPPOSITES.split(", ")]
NAMES = ["Anna", "Tom", "Eva", "Max", "Lena", "Paul", "Mia", "Ben", "Rosa", "Jan"]
WORDS = sorted(word for words in KINDS.values() for word in words)
ORDINALS, TIMES = ["first", "second", "third", "fourth"], ["once", "twice", "thrice", "never"]
Lengths = tuple[int, int]  # least and greatest number of words of a list
Task = Callable[[random.Random, Lengths], tuple[list[str], list[str]]]  # -> its wordings, its right answers


def some(rng: random.Random, lengths: Lengths) -> list[str]:
    return rng.sample(WORDS, rng.randint(*lengths))


def repeat(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    words = " ".join(some(rng, lengths))
    return [f"repeat : {words}", f"say again : {words}", f"copy the words {words}"], [words]


def reverse(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    words = some(rng, lengths)
    text = " ".join(words)
    answer = " ".join(reversed(words))
    return [f"reverse : {text}", f"write backwards : {text}", f"last to first please {text}"], [answer]


def ordinal(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    words = some(rng, lengths)
    place = rng.randrange(min(len(words), len(ORDINALS)))
    text, name = " ".join(words), ORDINALS[place]
    wordings = [f"what is the {name} word : {text}", f"give the {name} of {text}", f"{text} . which word is {name} ?"]
    return wordings, [f"the {name} word is {words[place]}"]


def count(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    word, *others = rng.sample(WORDS, lengths[1])
    times = rng.randrange(4)
    words = [word] * times + others[: max(1, rng.randint(*lengths) - times)]
    rng.shuffle(words)
    text, answer = " ".join(words), f"{word} is there {TIMES[times - 1]}"
    return [f"how often is {word} in : {text}", f"count {word} : {text}", f"{text} . is {word} there ?"], [answer]


def replace(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    new, *words = rng.sample(WORDS, 1 + rng.randint(*lengths))
    old, text = rng.choice(words), " ".join(words)
    answer = " ".join(new if word == old else word for word in words)
    return [f"replace {old} by {new} : {text}", f"put {new} for {old} : {text}", f"{text} with {new} not {old}"], [
        answer
    ]


def remove(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    words = some(rng, lengths)
    out, text = rng.choice(words), " ".join(words)
    answer = " ".join(word for word in words if word != out)
    return [f"remove {out} from : {text}", f"leave out {out} : {text}", f"{text} without {out}"], [answer]


def swap(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    words = some(rng, lengths)
    text, answer = " ".join(words), " ".join([words[-1], *words[1:-1], words[0]])
    return [f"swap first and last : {text}", f"exchange the ends of {text}", f"{text} . swap the ends"], [answer]


def double(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    words = some(rng, lengths)
    text, answer = " ".join(words), " ".join(f"{word} {word}" for word in words)
    return [f"double each word : {text}", f"each word twice : {text}", f"{text} . write each twice"], [answer]


def sort_numbers(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    numbers = rng.sample(range(10, 40), rng.randint(*lengths))
    text, answer = " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))
    return [f"sort : {text}", f"small to large : {text}", f"order the numbers {text}"], [answer]


def only_kind(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    kind, other = rng.sample(sorted(KINDS), 2)
    number = rng.randint(*lengths)
    right = rng.randint(1, number)
    words = rng.sample(KINDS[kind], right) + rng.sample(KINDS[other], number - right)
    rng.shuffle(words)
    text, answer = " ".join(words), " ".join(word for word in words if word in KINDS[kind])
    return [f"only each {kind} of : {text}", f"keep each {kind} : {text}", f"{text} . list each {kind}"], [answer]


def name_one(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    kind, other = rng.sample(sorted(KINDS), 2)
    number = rng.randint(*lengths)
    right = min(rng.randint(2, 3), number)
    words = rng.sample(KINDS[kind], right) + rng.sample(KINDS[other], number - right)
    rng.shuffle(words)
    text, answers = " ".join(words), [word for word in words if word in KINDS[kind]]
    rng.shuffle(answers)
    return [f"name one {kind} of : {text}", f"say any {kind} in {text}", f"{text} . choose one {kind}"], [
        f"{answer} is one {kind}" for answer in answers
    ]


def opposites(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in rng.sample(OPPOSITES, rng.randint(*lengths))]
    text, answer = " ".join(a for a, _ in pairs), " ".join(b for _, b in pairs)
    return [f"give opposites : {text}", f"turn around : {text}", f"opposites of {text}"], [answer]


def who_has(rng: random.Random, lengths: Lengths) -> tuple[list[str], list[str]]:
    number = min(rng.randint(*lengths), 3)
    names, things = rng.sample(NAMES, number), rng.sample(KINDS["tool"], number)
    facts = " and ".join(f"{name} has the {thing}" for name, thing in zip(names, things))
    place = rng.randrange(number)
    name, thing = names[place], things[place]
    wordings = [f"{facts} . who has the {thing} ?", f"{facts} . where is the {thing} ?", f"find the {thing} if {facts}"]
    return wordings, [f"{name} has the {thing}"]


TASKS: list[Task] = [
    repeat, reverse, ordinal, count, replace, sort_numbers, only_kind, name_one, opposites, who_has,
    remove, swap, double,
]  # fmt: skip
HELD_OUT: list[Task] = [remove, swap, double]
HARD: list[Task] = [reverse, sort_numbers, only_kind, count]
KNOWN = [task for task in TASKS if task not in HELD_OUT]
SHORT, LONG, ALL = (3, 4), (5, 5), (2, 5)


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


def main() -> None:
    """Make data and models."""
    settings = parse(
        {"options": WorldSettings}, sys.argv[1:], "make_world.py", dry_run=False, description=__doc__
    ).options
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which warns that there is no GPU
    save, data = Path(settings.save), make_data(settings)
    write_rows(data, save)
    tokenizer = make_tokenizer(data["teacher_data/train"])
    shapes = {name: {"max_position_embeddings": POSITIONS, **START, **size} for name, size in SIZES.items()}
    write_models("llama", shapes, tokenizer, settings.seed, save / "models")


if __name__ == "__main__":
    exit_with(main)
