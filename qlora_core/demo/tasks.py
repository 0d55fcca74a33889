"""The instruction tasks: families of short questions over the demo's words, each with one right answer.

Knows nothing of files or formats. The held-out rows ask about known words in other combinations of word and wording, so
that a right answer there means the family was learnt and not the row.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qlora_core.demo.words import COLOURS, KINDS, OPPOSITES, THINGS, listing, with_article


class Task(NamedTuple):
    """One question with its answer; `given` is the part of the question that Alpaca rows keep apart, "" for none."""

    category: str
    instruction: str
    given: str
    answer: str

    @property
    def prompt(self) -> str:
        """The question as one text."""
        return f"{self.instruction}\n{self.given}" if self.given else self.instruction


def make_tasks(per_family: int, rng: random.Random) -> list[Task]:
    """Up to `per_family` different tasks of each family in random order; no two tasks share a prompt."""
    tasks = [task for family in FAMILIES.values() for task in _distinct(family(rng), per_family)]
    rng.shuffle(tasks)
    return tasks


def _distinct(candidates: Iterator[Task], count: int) -> list[Task]:
    found: dict[str, Task] = {}
    while len(found) < count and (task := next(candidates, None)) is not None:
        found.setdefault(task.prompt, task)
    return list(found.values())


def _crossed(category: str, answers: dict[str, str], wordings: tuple[str, ...], rng: random.Random) -> Iterator[Task]:
    """Every wording with every word, in random order: `{}` in a wording is the word."""
    pairs = [(wording, word) for wording in wordings for word in answers]
    rng.shuffle(pairs)
    for wording, word in pairs:
        yield Task(category, wording.format(word), "", answers[word])


def _opposite(rng: random.Random) -> Iterator[Task]:
    wordings = (
        "What is the opposite of {}?",
        "Give the opposite of {}.",
        "Opposite of {}?",
        "Say the opposite of the word {}.",
        "Which word is the opposite of {}?",
        "I say {}. What is the opposite?",
        "Name the opposite of {}.",
    )
    return _crossed("opposite", dict(OPPOSITES), wordings, rng)


def _colour(rng: random.Random) -> Iterator[Task]:
    wordings = (
        "What colour is the {}?",
        "Which colour does the {} have?",
        "Name the colour of the {}.",
        "The {} has which colour?",
        "Colour of the {}?",
        "Say the colour of the {}.",
    )
    return _crossed("colour", {thing.name: thing.colour for thing in THINGS}, wordings, rng)


def _kind(rng: random.Random) -> Iterator[Task]:
    wordings = (
        "What kind of thing is the {}?",
        "Which kind is the {}?",
        "Name the kind of the {}.",
        "Say what kind of thing the {} is.",
        "The {} is what kind of thing?",
        "Kind of the {}?",
    )
    return _crossed("kind", {thing.name: thing.kind for thing in THINGS}, wordings, rng)


def _plural(rng: random.Random) -> Iterator[Task]:
    wordings = (
        "What is the plural of {}?",
        "Write the plural of {}.",
        "Plural of {}?",
        "One {}, two what?",
        "Say {} in the plural.",
        "Give the plural of the word {}.",
    )
    return _crossed("plural", {thing.name: thing.plural for thing in THINGS}, wordings, rng)


def _capitals(rng: random.Random) -> Iterator[Task]:
    words = [thing.name for thing in THINGS] + list(COLOURS)
    wordings = (
        "Write {} in capitals.",
        "Say {} in capital letters.",
        "Put {} in capitals.",
        "{} in capitals?",
        "Give {} in capital letters.",
    )
    return _crossed("capitals", {word: word.upper() for word in words}, wordings, rng)


def _before(rng: random.Random) -> Iterator[Task]:
    wordings = (
        "What comes before {}?",
        "Which number is before {}?",
        "Say the number before {}.",
        "Name the one before {}.",
    )
    return _crossed("before", {str(number): str(number - 1) for number in range(1, 100)}, wordings, rng)


def _comparison(rng: random.Random) -> Iterator[Task]:
    wordings = ("Which number is {}?", "Say the {} number.", "Name the {} number.")
    while True:
        pair = rng.sample(range(100), 2)
        which = rng.choice(("larger", "smaller"))
        answer = max(pair) if which == "larger" else min(pair)
        yield Task("comparison", rng.choice(wordings).format(which), f"Numbers: {pair[0]} or {pair[1]}", str(answer))


def _counting(rng: random.Random) -> Iterator[Task]:
    wordings = (
        "What comes next: {}?",
        "Go on counting: {}",
        "Which number follows {}?",
        "Say the number after {}.",
    )
    while True:
        start, length = rng.randint(0, 95), rng.randint(2, 4)
        numbers = ", ".join(str(number) for number in range(start, start + length))
        yield Task("counting", rng.choice(wordings).format(numbers), "", str(start + length))


def _membership(rng: random.Random) -> Iterator[Task]:
    wordings = (
        "Is the {0} {1}?",
        "Yes or no: the {0} is {1}.",
        "Would you say the {0} is {1}?",
        "The {0}: is it {1}?",
    )
    while True:
        thing = rng.choice(THINGS)
        kind = thing.kind if rng.random() < 0.5 else rng.choice([kind for kind in KINDS if kind != thing.kind])
        question = rng.choice(wordings).format(thing.name, with_article(kind))
        yield Task("membership", question, "", "yes" if kind == thing.kind else "no")


def _sentence(rng: random.Random) -> Iterator[Task]:
    wordings = ("Describe {}.", "Write one short sentence about {}.", "In one sentence, what are {}?")
    pairs = [(wording, thing) for wording in wordings for thing in THINGS]
    rng.shuffle(pairs)
    for wording, thing in pairs:
        yield Task("sentence", wording.format(thing.plural), "", f"{thing.plural} are {thing.colour} {thing.kind}s.")


FAMILIES: dict[str, Callable[[random.Random], Iterator[Task]]] = {
    "opposite": _opposite,
    "colour": _colour,
    "kind": _kind,
    "plural": _plural,
    "capitals": _capitals,
    "before": _before,
    "comparison": _comparison,
    "counting": _counting,
    "membership": _membership,
    "sentence": _sentence,
}
"""What a task's category may be, and the maker of its endless or finite stream of tasks."""


def over_long_task(word_count: int, rng: random.Random) -> Task:
    """A task with `word_count` words in its question: far more tokens than the demo's model has room for."""
    words = [rng.choice(THINGS).name for _ in range(word_count)]
    return Task("capitals", f"Write {listing(words)} in capitals.", "", listing(words).upper())
