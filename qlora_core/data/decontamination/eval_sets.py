"""Evaluation items from files: prompts, and a reference where there is one. Knows nothing of training rows.

Formats are recognised by fields, never by a file's name: GSM8K and MATH (question or problem), MMLU and ARC (question
and choices, or a filled-in prompt), TruthfulQA, MT-bench (turns), Vicuna, Arena-Hard, HumanEval (prompt or text),
Alpaca-like (instruction and input), chats (messages). An item that cannot be read is an error: passed over in silence,
it could leak into training.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_core.data.containers.record import Quarantined, Record
from qlora_core.data.records import read_records
from qlora_core.data.source_files import SourceFile
from qlora_core.data.text_form import join_input
from qlora_core.errors import DataError

MAX_ITEM_BYTES = 16 << 20
# In order: the first that holds text is the prompt.
PROMPT_FIELDS = ("question", "prompt", "instruction", "input", "inputs", "problem", "query", "text", "ctx", "content")
TURN_FIELDS = ("turns", "messages", "conversations", "conversation", "prompt", "question")
CHOICE_FIELDS = ("choices", "options", "endings")
REFERENCE_FIELDS = (
    "answer", "reference", "best_answer", "output", "response", "target", "targets", "answerkey", "answer_key",
    "canonical_solution", "solution", "completion", "label",
)  # fmt: skip
USER_ROLES = ("user", "human", "prompter")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Options that follow a question in its own text: "A. ..." and "B. ..." at the start of two lines, in any bracket.
OPTIONS = re.compile(r"\s*\n[ \t]*\(?A[.):][ \t].*?\n[ \t]*\(?B[.):][ \t]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class EvalItem:
    """One item: `prompts` are its user turns, at least one; `stem` a multiple-choice question without its options.

    `id` is `<set>/<line>`, the line (from 1) on which the item starts.
    """

    id: str
    line: int
    prompts: tuple[str, ...]
    stem: str | None = None
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class EvalSet:
    """The items of one file, in its order."""

    name: str
    items: tuple[EvalItem, ...]


def read_eval_sets(files: Sequence[SourceFile]) -> list[EvalSet]:
    """One set for each file, in order.

    Raises DataError for a file that cannot be read, holds a broken record, or holds a record without a prompt; the
    message names the file, the line and the fields.
    """
    return [_read_eval_set(file) for file in files]


def _read_eval_set(file: SourceFile) -> EvalSet:
    items = []
    for record in read_records(file, MAX_ITEM_BYTES):
        if isinstance(record, Quarantined):
            raise DataError(
                f"evaluation set {file.name}, line {record.line}: {record.reason}. Every item must be read, or it "
                "could leak into training: mend the file, or take it out of evaluate.prompt_sets"
            )
        items.append(_read_item(file.name, record))
    if not items:
        raise DataError(f"evaluation set {file.name} holds no item. Take it out of evaluate.prompt_sets, or fill it")
    return EvalSet(file.name, tuple(items))


def _read_item(name: str, record: Record) -> EvalItem:
    value = {"prompt": record.value} if isinstance(record.value, str) else record.value
    if not isinstance(value, Mapping):
        raise DataError(
            f"evaluation set {name}, line {record.line}: the record is a {type(value).__name__}, not an object with a "
            "prompt. Mend the file, or take it out of evaluate.prompt_sets"
        )
    fields = {"_".join(str(key).lower().split()): entry for key, entry in value.items()}
    prompts = _turns(fields) or _prompt(fields)
    if not prompts:
        raise DataError(
            f"evaluation set {name}, line {record.line}: no prompt found. The fields are "
            f"{', '.join(map(repr, value)) or 'none'}; a prompt is text in one of {', '.join(PROMPT_FIELDS)}, or a "
            f"list in one of {', '.join(TURN_FIELDS)}. Rename a field, or take the file out of evaluate.prompt_sets"
        )
    choices = _choices(fields)
    stem = prompts[0] if choices else _stem(prompts[0])
    if choices:
        prompts = ("\n".join([prompts[0], *(f"{letter}. {choice}" for letter, choice in choices)]), *prompts[1:])
    return EvalItem(f"{name}/{record.line}", record.line, prompts, stem, _reference(fields, choices))


def _turns(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The user turns of a list of texts or of messages."""
    for field in TURN_FIELDS:
        entries = fields.get(field)
        if isinstance(entries, Sequence) and not isinstance(entries, str):
            texts = [_turn_text(entry) for entry in entries]
            turns = tuple(text for text in texts if text)
            if turns:
                return turns
    return ()


def _turn_text(entry: object) -> str:
    if isinstance(entry, str):
        return entry.strip()
    if not isinstance(entry, Mapping):
        return ""
    role = entry.get("role", entry.get("from", "user"))
    content = entry.get("content", entry.get("value", entry.get("text")))
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "\n".join(filter(None, (_turn_text(part) for part in content)))
    return content.strip() if role in USER_ROLES and isinstance(content, str) else ""


def _prompt(fields: Mapping[str, Any]) -> tuple[str, ...]:
    for field in PROMPT_FIELDS:
        found = fields.get(field)
        if isinstance(found, Mapping):  # ARC: {"stem": ..., "choices": [...]}
            found = found.get("stem")
        if isinstance(found, str) and found.strip():
            more = fields.get("input") if field == "instruction" else None
            return (join_input(found, more if isinstance(more, str) else ""),)
    return ()


def _choices(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Letter and text of every option: from a list, from {"text", "label"} lists or entries, from columns A to Z."""
    nested = fields.get("question")
    sources = [fields.get(field) for field in CHOICE_FIELDS]
    sources += [nested.get("choices")] if isinstance(nested, Mapping) else []
    for found in sources:
        if isinstance(found, Mapping) and isinstance(found.get("text"), Sequence):
            texts, labels = list(found["text"]), list(found.get("label") or LETTERS)
        elif isinstance(found, Mapping):
            texts, labels = list(found.values()), [str(key) for key in found]
        elif isinstance(found, Sequence) and not isinstance(found, str):
            texts = [entry.get("text") if isinstance(entry, Mapping) else entry for entry in found]
            labels = [
                str(entry.get("label", LETTERS[i % 26])) if isinstance(entry, Mapping) else LETTERS[i % 26]
                for i, entry in enumerate(found)
            ]
        else:
            continue
        options = [(str(label), str(text)) for label, text in zip(labels, texts, strict=False)]
        if len(options) > 1:
            return options
    lettered = [(letter, str(fields[letter.lower()])) for letter in LETTERS if fields.get(letter.lower()) is not None]
    return lettered if len(lettered) > 1 and lettered[0][0] == "A" else []


def _stem(prompt: str) -> str | None:
    options = OPTIONS.search(prompt)
    return prompt[: options.start()].strip() or None if options else None


def _reference(fields: Mapping[str, Any], choices: Sequence[tuple[str, str]]) -> str | None:
    for field in REFERENCE_FIELDS:
        found = fields.get(field)
        if isinstance(found, Sequence) and not isinstance(found, str):
            found = "\n".join(str(part) for part in found)
        if isinstance(found, bool) or not isinstance(found, (str, int, float)):
            continue
        if choices and isinstance(found, int) and 0 <= found < len(choices):
            return choices[found][1]
        if str(found).strip():
            return str(found).strip()
    return None
