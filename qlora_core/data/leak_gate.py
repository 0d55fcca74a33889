"""The last look at a curated set: the files as written, checked from scratch for anything that is on two sides."""

from pathlib import Path

from qlora_core.data.dataset import StoredConversation, read_conversations
from qlora_core.data.split import SIDES, HeldOut
from qlora_core.data.text_form import folded
from qlora_core.errors import DataError

SHOWN_LEAKS = 5


def check_no_leaks(folder: Path) -> None:
    """Read the three written splits and compare every pair of them.

    Raises DataError, naming ids, if a row's whole conversation is on two sides (case, spacing and punctuation aside),
    if a prompt of one side is a user turn on another, or if an id occurs twice.
    """
    splits = {side: read_conversations(folder, side) for side in SIDES}
    leaks = [
        f"{row.id} ({later}) matches {match} ({earlier})"
        for earlier, later in (("test", "validation"), ("test", "train"), ("validation", "train"))
        for row, match in _between(splits[earlier], splits[later])
    ]
    ids = [row.id for rows in splits.values() for row in rows]
    if len(ids) != len(set(ids)):
        leaks.append("an id occurs twice")
    if leaks:
        raise DataError(
            f"the written splits leak, {len(leaks)} times: {'; '.join(leaks[:SHOWN_LEAKS])}. "
            "Do not evaluate on this set; curate again, and report this: curation should have dropped these rows"
        )


def _between(
    held_rows: list[StoredConversation], others: list[StoredConversation]
) -> list[tuple[StoredConversation, str]]:
    held = HeldOut()
    whole: dict[tuple[tuple[str, str], ...], str] = {}
    for row in held_rows:
        held.add(row)
        whole[_conversation(row)] = row.id
    matches = [(row, whole.get(_conversation(row)) or held.match(row)) for row in others]
    return [(row, match) for row, match in matches if match is not None]


def _conversation(row: StoredConversation) -> tuple[tuple[str, str], ...]:
    return tuple((message.role, folded(message.content)) for message in row.messages)
