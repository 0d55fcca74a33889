"""The small world the demo talks about: things, opposites and numbers. Knows nothing of sentences or of training.

The pretraining text states these facts in prose; the instruction set asks for them. One list keeps both in step.
"""

from typing import NamedTuple


class Thing(NamedTuple):
    """One noun of the demo's world with the facts that are told and asked about it."""

    name: str
    plural: str
    kind: str
    colour: str


def _things(kind: str, table: str) -> tuple[Thing, ...]:
    rows = [entry.strip().split(" ") for entry in table.split(",")]
    return tuple(Thing(name, plural, kind, colour) for name, plural, colour in rows)


THINGS = (
    *_things(
        "animal",
        "fox foxes red, wolf wolves grey, mouse mice grey, sheep sheep white, bear bears brown, frog frogs green, "
        "swan swans white, crow crows black, pig pigs pink, lion lions yellow, horse horses brown, goose geese white, "
        "seal seals grey, ant ants black",
    ),
    *_things(
        "fruit",
        "banana bananas yellow, lemon lemons yellow, cherry cherries red, plum plums purple, lime limes green, "
        "peach peaches orange, grape grapes purple, pear pears green, melon melons orange, berry berries blue",
    ),
    *_things(
        "tool",
        "hammer hammers black, knife knives grey, brush brushes brown, ladder ladders brown, saw saws grey, "
        "spade spades black, axe axes red, needle needles grey, wrench wrenches blue, torch torches yellow",
    ),
    *_things(
        "garment",
        "coat coats black, scarf scarves red, dress dresses pink, glove gloves brown, hat hats green, "
        "shirt shirts white, sock socks blue, boot boots brown, belt belts black, robe robes purple",
    ),
    *_things(
        "vehicle",
        "bus buses red, car cars blue, boat boats white, train trains green, truck trucks orange, "
        "tram trams yellow, ship ships grey, bike bikes pink, taxi taxis yellow, van vans white",
    ),
)

KINDS = ("animal", "fruit", "tool", "garment", "vehicle")
COLOURS = ("red", "grey", "white", "brown", "green", "black", "pink", "yellow", "purple", "orange", "blue")

OPPOSITE_PAIRS = (
    ("hot", "cold"),
    ("big", "small"),
    ("old", "young"),
    ("fast", "slow"),
    ("wet", "dry"),
    ("rich", "poor"),
    ("hard", "soft"),
    ("full", "empty"),
    ("high", "low"),
    ("dark", "bright"),
    ("heavy", "light"),
    ("early", "late"),
    ("loud", "quiet"),
    ("clean", "dirty"),
    ("strong", "weak"),
    ("open", "closed"),
    ("happy", "sad"),
    ("long", "short"),
    ("deep", "shallow"),
    ("thick", "thin"),
    ("near", "far"),
    ("brave", "shy"),
    ("sweet", "bitter"),
    ("tight", "loose"),
)
OPPOSITES = {word: other for pair in OPPOSITE_PAIRS for word, other in (pair, pair[::-1])}

NAMES = ("Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "June")
PLACES = ("garden", "market", "kitchen", "harbour", "school", "forest", "village", "station")


def with_article(noun: str) -> str:
    """`a fox`, `an ant`: by the first letter, which is right for every word in this file."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def listing(words: list[str], joint: str = "and") -> str:
    """`red, blue and green`; one word stands alone."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {joint} {words[-1]}"
