"""Votes out and in again: no form loses or turns a vote."""

import csv
import io
import json
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.statistics.agreement import read_labels
from qlora_core.evaluation.verdict import read_verdicts
from qlora_core.evaluation.vote.ballots import BallotBox
from qlora_core.evaluation.vote.export import csv_text, export_texts, write_export
from qlora_core.evaluation.vote.imports import read_votes
from qlora_core.evaluation.vote.records import VoteRecord, counted, vote_records

MakeBox = Callable[..., BallotBox]


def records_of(box: BallotBox) -> list[VoteRecord]:
    with box.state() as state:
        return vote_records(state, box.pairs)


def meaning(records: list[VoteRecord]) -> set[tuple]:
    """Votes without regard to where they were cast and which model a pair names first."""
    return {
        (
            record.prompt_id,
            record.rater,
            {"a": record.model_a, "b": record.model_b}.get(str(record.label), record.label),
            {"a": record.model_a, "b": record.model_b}.get(str(record.first)),
        )
        for record in counted(records)
    }


@pytest.fixture
def rated(make_box: MakeBox, play: Callable) -> BallotBox:
    box = make_box(12, gold=2, raters_per_item=2, repeat_share=0.1, self_share=0.1)
    for seed, rater in enumerate(("ann", "ben")):
        play(box, rater, seed, skips=0.1)
    return box


def copy_of(box: BallotBox, path: Path, *, turned: bool = False) -> BallotBox:
    """A study of the same pairs without votes; `turned`: each names its models the other way round."""
    pairs = list(box.pairs.values())
    if turned:
        pairs = [
            pair.model_copy(
                update={
                    "model_a": pair.model_b,
                    "model_b": pair.model_a,
                    "answer_a": pair.answer_b,
                    "answer_b": pair.answer_a,
                }
            )
            for pair in pairs
        ]
    return BallotBox.create(path, pairs)


@pytest.mark.parametrize("name", ["votes.jsonl", "votes.csv", "label-studio.json", "verdicts.jsonl"])
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_exported_is_imported_once(rated: BallotBox, tmp_path: Path, name: str, turned: bool) -> None:
    write_export(tmp_path / "out", records_of(rated), rated.pairs)
    other = copy_of(rated, tmp_path / "other.sqlite", turned=turned)
    plan = read_votes(tmp_path / "out" / name, other.pairs)
    assert other.take_import(plan.votes) == len(counted(records_of(rated))) > 0
    assert meaning(records_of(other)) == meaning(records_of(rated))
    assert other.take_import(read_votes(tmp_path / "out" / name, other.pairs).votes) == 0


def test_label_rows_carry_no_side_and_none_is_invented(rated: BallotBox, tmp_path: Path) -> None:
    write_export(tmp_path / "out", records_of(rated), rated.pairs)
    other = copy_of(rated, tmp_path / "other.sqlite")
    other.take_import(read_votes(tmp_path / "out" / "labels.jsonl", other.pairs).votes)
    assert {record.first for record in records_of(other)} == {None}
    texts = export_texts(records_of(other), other.pairs)
    assert texts["verdicts.jsonl"]() == ""
    assert len(texts["labels.jsonl"]().splitlines()) == len(counted(records_of(rated)))


def test_exported_rows_are_those_of_the_other_commands(rated: BallotBox, tmp_path: Path) -> None:
    records = records_of(rated)
    write_export(tmp_path, records, rated.pairs)
    verdicts = read_verdicts(tmp_path / "verdicts.jsonl")
    ratings = [record for record in records if record.occasion == "rating"]
    assert len(verdicts) == len(ratings)
    for verdict, record in zip(verdicts, ratings, strict=True):
        expected = {"both_bad": "tie"}.get(str(record.label), record.label)
        assert (verdict.verdict, verdict.first, verdict.judge) == (expected, record.first, f"human:{record.rater}")
        assert verdict.reason == (
            "skipped" if record.label is None else "both_bad" if record.label == "both_bad" else None
        )
    labels = read_labels(tmp_path / "labels.jsonl")
    assert [(row.item_id, row.rater_id, row.label) for row in labels] == [
        (record.item_id, record.rater, record.label) for record in counted(records)
    ]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "votes.csv").read_text())))
    assert len(rows) == len(records)


def test_label_studios_own_pairwise_result_is_read(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box(2)
    annotation = {
        "id": 7,
        "completed_by": 3,
        "result": [{"type": "pairwise", "from_name": "pw", "value": {"selected": "right"}}],
        "was_cancelled": False,
        "created_at": "2026-01-02T03:04:05.123456Z",
    }
    cancelled = {"completed_by": {"email": "eve@example.org"}, "result": [], "was_cancelled": True}
    path = tmp_path / "project.json"
    path.write_text(json.dumps([{"id": 1, "data": {"item_id": "p1"}, "annotations": [annotation, cancelled]}]))
    plan = read_votes(path, box.pairs)
    ((_, vote),) = plan.votes
    assert (vote.rater, vote.item, vote.label, vote.first, plan.skipped) == ("3", "p1", "b", "a", 1)
    assert vote.at == pytest.approx(1767323045.123456)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("v.jsonl", '{"item_id": "p9", "rater_id": "ann", "label": "a"}', "does not have, such as p9"),
        ("v.jsonl", '{"item_id": "p1", "rater_id": "ann", "label": "left"}', "line 1: label"),
        ("v.jsonl", '{"item_id": "p1", "rater_id": "ann"}', "line 1: label"),
        ("v.jsonl", '{"item_id": "p1", "label": "a"}', "line 1: rater"),
        ("v.csv", "item_id,rater,label\np1,ann,left\n", "vote 1: label"),
        ("v.json", '[{"data": {}, "annotations": [{}]}]', "not Label Studio's"),
        ("v.json", "[1", "not Label Studio's"),
    ],
)
def test_votes_of_no_known_form_are_refused(
    make_box: MakeBox, tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_votes(tmp_path / name, make_box(3).pairs)


def test_a_second_vote_of_a_rater_on_a_pair_is_refused_and_nothing_is_taken(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box(3)
    task = box.current("ann").task
    assert task is not None
    box.vote("ann", secrets.token_hex(16), task.task, "left")
    rows = [{"item_id": item, "rater_id": "ann", "label": "tie"} for item in box.pairs]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(EvaluationError, match="has a vote"):
        box.take_import(read_votes(tmp_path / "v.jsonl", box.pairs).votes)
    assert len(records_of(box)) == 1


def test_imported_votes_fill_pairs_and_are_not_asked_for_again(make_box: MakeBox, tmp_path: Path) -> None:
    box = make_box(3, raters_per_item=1)
    (tmp_path / "v.jsonl").write_text('{"item_id": "p1", "rater_id": "eve", "label": "a"}')
    box.take_import(read_votes(tmp_path / "v.jsonl", box.pairs).votes)
    assert box.current("ann").progress.remaining == 2
    assert box.current("eve").progress.remaining == 1  # p0 or p2: ann holds the other


def test_a_note_is_no_formula(make_box: MakeBox) -> None:
    box = make_box(3)
    task = box.current("ann").task
    assert task is not None
    box.vote("ann", secrets.token_hex(16), task.task, "left", '=HYPERLINK("http://evil.test")')
    (row,) = csv.DictReader(io.StringIO(csv_text(records_of(box))))
    assert row["note"].startswith("'=")
