"""Generated pretraining text about the demo's world: prose, lists, and chat turns in whole sentences.

Every sentence is the project's own and depends on the generator given, nothing else. The assistant here talks in
whole sentences about what it was asked; it never gives the short answers the instruction set wants. That is what is
left for an adapter to learn.
"""

import random
from collections.abc import Callable, Sequence

from qlora_core.demo.words import (
    COLOURS,
    KINDS,
    NAMES,
    OPPOSITES,
    PLACES,
    THINGS,
    listing,
    with_article,
)

Turn = tuple[str, str]


def pretraining_documents(count: int, rng: random.Random) -> list[str | list[Turn]]:
    """`count` documents in a random order: a string is prose, a list of (role, content) is a conversation.

    About half are conversations, so that the base model knows where turns begin and end. `count` 0 gives none.
    """
    return [chat(rng) if rng.random() < 0.5 else prose(rng) for _ in range(count)]


def prose(rng: random.Random) -> str:
    """A paragraph of two to five sentences, or a list, about a few words of the demo's world."""
    makers = rng.choices(_PROSE, k=rng.randint(2, 5))
    return " ".join(maker(rng) for maker in makers)


def chat(rng: random.Random) -> list[Turn]:
    """A conversation of one or two exchanges, now and then led by a system message."""
    turns: list[Turn] = []
    if rng.random() < 0.1:
        turns.append(("system", rng.choice(("You are a friendly helper.", "You like whole sentences."))))
    for _ in range(1 if rng.random() < 0.8 else 2):
        question, answer = rng.choice(_CHAT)(rng)
        turns += [("user", question), ("assistant", answer)]
    return turns


def _colour_fact(rng: random.Random) -> str:
    thing = rng.choice(THINGS)
    return rng.choice(
        (
            f"The {thing.name} is {thing.colour}.",
            f"{_capital(thing.plural)} are {thing.colour}.",
            f"{rng.choice(NAMES)} saw {with_article(thing.colour)} {thing.name} in the {rng.choice(PLACES)}.",
            f"{_capital(thing.colour)} is the colour of {with_article(thing.name)}.",
        )
    )


def _kind_fact(rng: random.Random) -> str:
    thing = rng.choice(THINGS)
    return rng.choice(
        (
            f"{_capital(with_article(thing.name))} is {with_article(thing.kind)}.",
            f"{_capital(thing.plural)} are {thing.kind}s.",
            f"The {thing.name} is {with_article(thing.colour)} {thing.kind}.",
            f"Every {thing.name} is {with_article(thing.kind)}.",
        )
    )


def _kind_list(rng: random.Random) -> str:
    kind = rng.choice(KINDS)
    members = rng.sample([thing.plural for thing in THINGS if thing.kind == kind], 3)
    return f"{_capital(listing(members))} are {kind}s."


def _membership_fact(rng: random.Random) -> str:
    thing, kind = rng.choice(THINGS), rng.choice(KINDS)
    kind = rng.choice((kind, thing.kind))
    return f"The {thing.name} is {with_article(kind)}, {'yes' if kind == thing.kind else 'no'}."


def _plural_fact(rng: random.Random) -> str:
    thing = rng.choice(THINGS)
    return rng.choice(
        (
            f"One {thing.name}, two {thing.plural}.",
            f"{rng.choice(NAMES)} has one {thing.name}, {rng.choice(NAMES)} has {rng.randint(2, 99)} {thing.plural}.",
            f"There was {with_article(thing.name)} in the {rng.choice(PLACES)}, and then many {thing.plural} came.",
        )
    )


def _opposite_fact(rng: random.Random) -> str:
    word = rng.choice(list(OPPOSITES))
    return rng.choice(
        (
            f"The opposite of {word} is {OPPOSITES[word]}.",
            f"If it is not {word}, it is {OPPOSITES[word]}.",
            f"{_capital(word)} and {OPPOSITES[word]} are opposites.",
            f"{rng.choice(NAMES)} is {word}, but {rng.choice(NAMES)} is {OPPOSITES[word]}.",
        )
    )


def _counting(rng: random.Random) -> str:
    start = rng.randint(0, 93)
    return f"Count with me: {', '.join(str(number) for number in range(start, start + rng.randint(4, 6)))}."


def _comparison(rng: random.Random) -> str:
    small, large = sorted(rng.sample(range(100), 2))
    return rng.choice((f"{large} is more than {small}.", f"{small} is less than {large}."))


def _headline(rng: random.Random) -> str:
    word = rng.choice((rng.choice(THINGS).name, rng.choice(COLOURS)))
    return rng.choice(
        (f"The sign said {word.upper()}, which means {word}.", f"The word {word} in capitals is {word.upper()}.")
    )


def _word_list(rng: random.Random) -> str:
    words = [_any_word(rng) for _ in range(rng.randint(3, 5))]
    return rng.choice(
        (
            f"The list was: {', '.join(words)}. It began with {words[0]} and ended with {words[-1]}.",
            f"Words: {', '.join(words)}. The first is {words[0]}, the last is {words[-1]}.",
        )
    )


def _talk_about_thing(rng: random.Random) -> Turn:
    thing = rng.choice(THINGS)
    question = rng.choice((f"Tell me about the {thing.name}.", f"What do you know about {thing.plural}?"))
    answer = rng.choice((_capital(with_article(thing.name)), f"The {thing.name}"))
    return question, f"{answer} is {with_article(thing.colour)} {thing.kind}. {rng.choice(NAMES)} likes {thing.plural}."


def _talk_about_word(rng: random.Random) -> Turn:
    word = rng.choice(list(OPPOSITES))
    question = rng.choice((f"Tell me about the word {word}.", f"Use {word} in a sentence."))
    return question, f"{_capital(word)} is not {OPPOSITES[word]}. The {rng.choice(PLACES)} is {word}."


def _talk_about_numbers(rng: random.Random) -> Turn:
    number = rng.randint(1, 98)
    question = rng.choice((f"Tell me about the number {number}.", f"What do you know about {number}?"))
    return question, f"{number} stands after {number - 1} and before {number + 1}."


def _talk_about_list(rng: random.Random) -> Turn:
    words = [_any_word(rng) for _ in range(rng.randint(2, 4))]
    question = rng.choice((f"Here is a list. Words: {', '.join(words)}", f"I have some words: {', '.join(words)}."))
    return question, f"{', '.join(words)}: that is a list of {len(words)} words."


def _talk_in_words(rng: random.Random) -> Turn:
    word = _any_word(rng)
    question = rng.choice((f"I like the word {word}.", f"Say something about {word}.", f"Do you know {word}?"))
    return question, rng.choice((f"{word} is a good word.", f"{word}, {word}, {word}.", f"{word} I know."))


def _any_word(rng: random.Random) -> str:
    group: Sequence[str] = rng.choice(
        (
            [thing.name for thing in THINGS],
            [thing.plural for thing in THINGS],
            COLOURS,
            KINDS,
            list(OPPOSITES),
        )
    )
    return rng.choice(group)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


_PROSE: tuple[Callable[[random.Random], str], ...] = (
    _colour_fact,
    _kind_fact,
    _kind_list,
    _membership_fact,
    _plural_fact,
    _opposite_fact,
    _counting,
    _comparison,
    _headline,
    _word_list,
)
_CHAT: tuple[Callable[[random.Random], Turn], ...] = (
    _talk_about_thing,
    _talk_about_word,
    _talk_about_numbers,
    _talk_about_list,
    _talk_in_words,
)
