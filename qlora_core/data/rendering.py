"""Runs a chat template on conversations, and keeps it within bounds: its sandbox, its time, the length of its output.

Templates come with checkpoints and are strangers' code. transformers runs them in jinja2's sandbox: no attribute of
Python's insides, no file, no import, no range over 100,000 items. What the sandbox lets pass is bounded here: the
time of a call, the length of what it writes, powers. Not bounded: a single operation that fills the memory at once
(`'a' * 9999999999`). Knows nothing of tokens.
"""

import ctypes
import re
import threading
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from qlora_core.data.row import Message
from qlora_core.errors import MaskError

Origin = Literal["file", "tokenizer", "plain default"]
Result = TypeVar("Result")

# Llama 3 templates write today's date unless told one; a fixed one keeps two runs byte-equal. Templates that know
# nothing of these variables ignore them. Reasoning is off: dataset answers come without it.
TEMPLATE_VARIABLES = {"date_string": "26 Jul 2024", "enable_thinking": False}

# What a user's template may raise besides Jinja's own errors.
TEMPLATE_FAULTS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)

# A call renders a few hundred conversations in hundredths of a second.
RENDER_LIMIT_S = 20.0
# The longest known templates write some ten thousand characters of their own.
MAX_OWN_CHARACTERS = 200_000
MAX_CONTENT_COPIES = 8

INSIDES = re.compile(r"__\w+__")

NEXT_STEP = (
    "Name a Jinja file in data.chat_template that writes each assistant text unchanged, directly after what "
    "add_generation_prompt writes, and {{ eos_token }} directly after the text"
)


class _TimeUp(BaseException):
    """No Exception, so that nothing between the template and `_within` takes it for the template's own."""


def check_code(template: str, origin: Origin) -> None:
    """Raises MaskError for what no honest template needs, before any of it runs or is compiled.

    A name of Python's insides (`__class__`): the sandbox gives nothing for it, and a blank would pass unnoticed. A
    power: `10**10**10` never ends, not even while compiling. A text that is no Jinja passes here; rendering it says
    what is wrong.
    """
    try:
        tokens = list(Environment().lex(template))
    except TemplateError:
        return
    for line, kind, value in tokens:
        if kind in ("name", "string") and INSIDES.fullmatch(value.strip("'\"")):
            fault = f"reaches for Python's insides ({value.strip()})"
        elif kind == "operator" and value == "**":
            fault = "computes a power (**), which could run forever"
        else:
            continue
        raise MaskError(f"the chat template ({origin}) {fault} in line {line}. {NEXT_STEP}")


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    origin: Origin,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as the tokenizer's template writes it.

    Raises MaskError if the template fails, runs for too long or writes without end.
    """
    [text] = render_all(tokenizer, [messages], origin, add_generation_prompt=add_generation_prompt)
    if isinstance(text, MaskError):
        raise text
    return text


def render_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    origin: Origin,
    *,
    add_generation_prompt: bool = False,
) -> list[str | MaskError]:
    """Each conversation's text, or why the template refuses it; in the order given.

    Raises MaskError if all of them together take longer than RENDER_LIMIT_S: then no row can be blamed.
    """
    if not conversations:
        return []
    turns = [[{"role": turn.role, "content": turn.content} for turn in messages] for messages in conversations]

    def apply(part: list[list[dict[str, str]]]) -> list[str]:
        texts = tokenizer.apply_chat_template(
            part, tokenize=False, add_generation_prompt=add_generation_prompt, **TEMPLATE_VARIABLES
        )
        return [str(text) for text in texts]

    def one_by_one() -> list[str | MaskError]:
        return [_alone(apply, one, origin) for one in turns]

    try:
        texts: list[str | MaskError] = [*_within(RENDER_LIMIT_S, lambda: apply(turns), origin)]
    except TEMPLATE_FAULTS as error:
        if isinstance(error, MaskError):
            raise
        texts = _within(RENDER_LIMIT_S, one_by_one, origin)
    return [_bounded(text, one, origin) for text, one in zip(texts, turns, strict=True)]


def _alone(
    apply: Callable[[list[list[dict[str, str]]]], list[str]], turns: list[dict[str, str]], origin: Origin
) -> str | MaskError:
    try:
        return apply([turns])[0]
    except TEMPLATE_FAULTS as error:
        fault = MaskError(
            f"the chat template ({origin}) fails on turns {[turn['role'] for turn in turns]}: "
            f"{type(error).__name__}: {error}. {NEXT_STEP}"
        )
        fault.__cause__ = error
        return fault


def _bounded(text: str | MaskError, turns: list[dict[str, str]], origin: Origin) -> str | MaskError:
    if isinstance(text, MaskError):
        return text
    given = sum(len(turn["content"]) for turn in turns)
    if len(text) > MAX_OWN_CHARACTERS + MAX_CONTENT_COPIES * given:
        return MaskError(
            f"the chat template ({origin}) writes {len(text)} characters for a conversation of {given}; "
            f"{MAX_OWN_CHARACTERS} of its own are allowed. {NEXT_STEP}"
        )
    return text


def _within(seconds: float, action: Callable[[], Result], origin: Origin) -> Result:
    """The action's result. Raises MaskError where it takes longer; works in any thread, on Python code alone."""
    thread = ctypes.c_ulong(threading.get_ident())
    lock = threading.Lock()
    done = False

    def interrupt() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_TimeUp))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    try:
        timer.start()
        try:
            return action()
        finally:
            with lock:
                done = True
                # An interrupt that came as the action ended must not hit what follows.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
    except _TimeUp as error:
        raise MaskError(
            f"the chat template ({origin}) did not finish within {seconds:g} s; does it loop? {NEXT_STEP}"
        ) from error
    finally:
        timer.cancel()
