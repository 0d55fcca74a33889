"""Forms of a text in which equal prompts look equal. Knows nothing of rows."""

import re
import unicodedata

# By its tables texts are composed and folded.
UNICODE_VERSION = unicodedata.unidata_version
# Marks that end or join sentences. Operators (+ - * / = < > %) and brackets stay: "3 + 4" is not "3 - 4".
SENTENCE_MARKS = re.compile(r"[.,;:!?¿¡…\"'`‘’“”«»。，、；：！？]+")
_ASCII_MARKS = str.maketrans(dict.fromkeys(".,;:!?\"'`", " "))

ALPACA_OPENING = "Below is an instruction that describes a task"
ALPACA_PREAMBLE = re.compile(rf"\s*{ALPACA_OPENING}\b")
ALPACA_PARTS = re.compile(
    r"### Instruction:[ \t]*\n(?P<instruction>.*?)"
    r"(?:\n+### Input:[ \t]*\n(?P<input>.*?))?"
    r"\n+### Response:\s*\Z",
    re.DOTALL,
)


def spaced(text: str) -> str:
    """`text` in Unicode's composed form with every run of white space made one blank, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def folded(text: str) -> str:
    """`text` without case, compatibility forms, spacing and sentence punctuation: how a leaked prompt is recognised.

    A text of nothing but punctuation would fold to nothing and equal every other such text; it keeps its marks.
    """
    if text.isascii():
        # The same by a third of the time: ASCII has no other forms, and its case folds to lower
        plain = text.lower()
        return " ".join(plain.translate(_ASCII_MARKS).split()) or " ".join(plain.split())
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(SENTENCE_MARKS.sub(" ", plain).split()) or " ".join(plain.split())


def join_input(instruction: str, context: str) -> str:
    """One prompt from an instruction and the text it is about; a blank context adds nothing."""
    return f"{instruction.strip()}\n\n{context.strip()}" if context.strip() else instruction.strip()


def strip_alpaca_wrapper(text: str) -> str:
    """The instruction (and input) inside Alpaca's fixed preamble; any other text comes back unchanged.

    Only the wrapper as a whole is taken off: a text that merely quotes the preamble has no `### Response:` at its end.
    """
    if not ALPACA_PREAMBLE.match(text):
        return text
    parts = ALPACA_PARTS.search(text)
    if parts is None:
        return text
    return join_input(parts["instruction"], parts["input"] or "")
