"""The promotion log as a hash chain: whatever is done to its entries shows, on the chain alone and in the registry."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from mlflow import MlflowClient

from qlora_core.errors import RegistryError
from qlora_core.registry.aliases import alias_version
from qlora_core.registry.chain import BrokenChainError, Link, head_text, next_link, read_chain
from qlora_core.registry.history import MAX_REASON_CHARACTERS, Move, read_log, read_moves, start_move
from qlora_core.registry.promotion import promote, read_history, rollback
from qlora_core.registry.versions import RegisteredVersion

ORIGIN = "0" * 64


def chain_of(count: int) -> list[Link]:
    chain: list[Link] = []
    for number in range(count):
        chain.append(next_link(chain, {"move": number, "reason": f"because {number}"}, origin=ORIGIN))
    return chain


def texts(chain: list[Link]) -> dict[int, str]:
    return {link.number: link.text() for link in chain}


def test_a_sound_chain_reads_back_and_so_does_none() -> None:
    chain = chain_of(4)
    assert read_chain(texts(chain), head_text(chain), origin=ORIGIN) == chain
    assert read_chain({}, None, origin=ORIGIN) == []


def test_a_writer_that_died_before_the_head_is_forgiven_one_entry() -> None:
    chain = chain_of(3)
    assert read_chain(texts(chain), head_text(chain[:2]), origin=ORIGIN) == chain
    assert read_chain(texts(chain[:1]), None, origin=ORIGIN) == chain[:1]
    with pytest.raises(BrokenChainError, match="names 1 entries"):
        read_chain(texts(chain), head_text(chain[:1]), origin=ORIGIN)
    with pytest.raises(BrokenChainError, match="no head"):
        read_chain(texts(chain), None, origin=ORIGIN)


@pytest.mark.parametrize("deleted", [1, 2, 3, 4])
def test_every_deletion_shows(deleted: int) -> None:
    chain = chain_of(4)
    entries = texts(chain)
    del entries[deleted]
    with pytest.raises(BrokenChainError):
        read_chain(entries, head_text(chain), origin=ORIGIN)
    renumbered = dict(enumerate(entries.values(), start=1))
    with pytest.raises(BrokenChainError):
        read_chain(renumbered, head_text(chain), origin=ORIGIN)


@pytest.mark.parametrize(("one", "other"), [(1, 2), (2, 3), (1, 4), (3, 4)])
def test_every_exchange_shows(one: int, other: int) -> None:
    chain = chain_of(4)
    entries = texts(chain)
    entries[one], entries[other] = entries[other], entries[one]
    with pytest.raises(BrokenChainError, match=f"entry {max(one, other)} stands in place {min(one, other)}"):
        read_chain(entries, head_text(chain), origin=ORIGIN)


@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_every_edited_character_shows(place: int) -> None:
    chain = chain_of(4)
    for at in range(len(chain[place - 1].text())):
        entries = texts(chain)
        text = entries[place]
        entries[place] = text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
        with pytest.raises(BrokenChainError):
            read_chain(entries, head_text(chain), origin=ORIGIN)


def test_an_edited_head_and_another_origin_show() -> None:
    chain = chain_of(2)
    for head in ("{}", "x", head_text(chain).replace("2", "3", 1), head_text(chain_of(3)[:2])[:-3] + '0"}'):
        with pytest.raises(BrokenChainError):
            read_chain(texts(chain), head, origin=ORIGIN)
    with pytest.raises(BrokenChainError):
        read_chain(texts(chain), head_text(chain), origin="1" * 64)


@pytest.fixture
def moved(
    register: Callable[..., RegisteredVersion],
    better: dict[str, Any],
    tracking_uri: str,
    model_name: str,
) -> str:
    """A model whose champion moved twice: four entries."""
    register(1, better)
    promote(tracking_uri, model_name, version="1")
    register(2, better)
    promote(tracking_uri, model_name, version="2", force_reason="asked for")
    return model_name


def log_tags(client: MlflowClient, name: str) -> dict[str, str]:
    return {key: text for key, text in client.get_registered_model(name).tags.items() if "promotion_log." in key}


def test_moves_name_their_evidence_and_history_the_head(client: MlflowClient, tracking_uri: str, moved: str) -> None:
    moves = read_moves(client, moved)
    assert [(move.version, move.previous, move.state) for move in moves] == [("1", None, "done"), ("2", "1", "done")]
    assert moves[0].evidence == client.get_model_version(moved, "1").tags["evidence_sha256"]
    history = read_history(tracking_uri, moved)
    assert history["head"] == read_log(client, moved).head and len(history["moves"]) == 2
    assert len(log_tags(client, moved)) == 4


@pytest.mark.parametrize("fault", ["edited", "deleted", "exchanged", "head deleted"])
def test_a_log_that_was_touched_stops_every_move(
    client: MlflowClient, tracking_uri: str, moved: str, fault: str
) -> None:
    entries = log_tags(client, moved)
    first, second = sorted(entries)[:2]
    if fault == "edited":
        client.set_registered_model_tag(moved, first, entries[first].replace("Better", "Worse"))
    elif fault == "deleted":
        client.delete_registered_model_tag(moved, first)
    elif fault == "exchanged":
        client.set_registered_model_tag(moved, first, entries[second])
        client.set_registered_model_tag(moved, second, entries[first])
    else:
        client.delete_registered_model_tag(moved, "promotion_log_head")
    for attempt in (
        lambda: read_history(tracking_uri, moved),
        lambda: rollback(tracking_uri, moved, None, "undo"),
        lambda: promote(tracking_uri, moved, version="1", force_reason="undo"),
    ):
        with pytest.raises(RegistryError, match="is not as it was written"):
            attempt()
    assert alias_version(client, moved, "champion") == "2"
    for key, text in entries.items():
        client.set_registered_model_tag(moved, key, text)
    if fault != "head deleted":
        assert rollback(tracking_uri, moved, None, "undo")["champion"] == "1"


def test_entries_of_before_the_chain_stay_and_are_chained_to(client: MlflowClient, model_name: str) -> None:
    client.create_registered_model(model_name)
    old = Move(1, "promote", "7", None, "why", "2026-01-01T00:00:00+00:00", "done")
    written = {key: value for key, value in vars(old).items() if key not in ("by", "evidence")}
    client.set_registered_model_tag(model_name, "promotion.000001", json.dumps(written))
    start_move(client, model_name, action="promote", version="8", previous="7", reason="x" * 9000)
    moves = read_moves(client, model_name)
    assert [move.number for move in moves] == [1, 2] and moves[0] == old
    assert len(moves[1].reason) == MAX_REASON_CHARACTERS
    client.set_registered_model_tag(model_name, "promotion.000001", json.dumps({**written, "reason": "other"}))
    with pytest.raises(RegistryError, match="entry 1 does not follow"):
        read_moves(client, model_name)
