"""What can be said of one answer without a judge: words, refusal, degeneration, form. Knows text alone.

The phrases of a refusal are English; refusals in other languages are not seen.
"""

import json
import re

from qlora_core.evaluation.exact_match import FINAL_ANSWER

REFUSAL = re.compile(
    r"^\W*(?:i['’]?m (?:very |so |really )?sorry|sorry|i apologi[sz]e|as an ai\b|unfortunately)?[^.!?\n]{0,60}?"
    r"\bi(?:['’]m| am)? (?:can ?not|can['’]t|won['’]t|will not|unable to|not able to|not allowed to|must decline)\b",
    re.IGNORECASE,
)
REFUSAL_WINDOW = 200
"""Characters from the start: a refusal says so at once, later "I cannot" is part of an answer."""

NGRAM = 4
LEAST_NGRAMS = 16
REPEATED_SHARE = 0.5


def word_count(answer: str) -> int:
    """Words separated by white space; a text in a script without spaces counts its characters instead."""
    return len(_units(answer))


def is_refusal(answer: str) -> bool:
    """Whether the answer opens by declining in English."""
    return REFUSAL.search(answer[:REFUSAL_WINDOW]) is not None


def is_degenerate(answer: str, question: str) -> bool:
    """Whether the answer is empty, repeats the question, or loops.

    A loop: more than half of its 4-grams of words occurred before in it (seq-rep-4 of Welleck et al. 2020, "Neural text
    generation with unlikelihood training"), of at least 16.
    """
    text = answer.strip()
    if not text or text == question.strip():
        return True
    units = _units(text.casefold())
    grams = [tuple(units[start : start + NGRAM]) for start in range(len(units) - NGRAM + 1)]
    return len(grams) >= LEAST_NGRAMS and 1 - len(set(grams)) / len(grams) > REPEATED_SHARE


def keeps_form(answer: str, reference: str) -> bool | None:
    """Whether the answer has its reference's form; None where that has none that is known.

    Forms: a JSON object or array, and a last line `#### N` as in GSM8K.
    """
    if _is_json(reference):
        return _is_json(answer)
    if FINAL_ANSWER.search(reference):
        return FINAL_ANSWER.search(answer) is not None
    return None


def _units(text: str) -> list[str]:
    words = text.split()
    longest = max(map(len, words), default=0)
    return list("".join(words)) if longest > 40 and len(words) * 20 < len(text) else words


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False
