"""The tasks of the small study's world: instructions on lists of words and numbers, and their right answers.

A task draws an instruction. It returns the same instruction in three wordings, and all right answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable

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
