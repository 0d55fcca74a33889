"""Every step of curation through the stage's own door: each test fails where its step is left out."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from qlora_core.config.data import DataConfig
from qlora_core.data.curate import curate
from qlora_core.data.packing import read_packs
from qlora_core.data.shards import shard_files
from qlora_core.data.split import SIDES
from qlora_core.data.tags.cache import FolderShelf, TagCache
from qlora_core.errors import ConfigError, DataError

WriteJsonl = Callable[..., Path]
Run = Callable[..., tuple[dict[str, Any], Path]]
KEY = "AKIA" + "Q3EGRT5WZ7KD2MLP"
MAIL = "jo.smith@" + "acme-widgets.io"
STORY = "Tom had {n} red apples and gave away {m} of them to his sister on a sunny day in May. How many were left?"


@pytest.fixture
def run(tmp_path: Path, plain_tokenizer: Path) -> Run:
    """Curates files and returns curation.json's content and the folder; language is off: its models load slowly."""

    def curate_here(*sources: Path, name: str = "out", **settings: Any) -> tuple[dict[str, Any], Path]:
        other = {key: settings.pop(key) for key in ("prompt_sets", "earlier", "tag_cache") if key in settings}
        settings.setdefault("tags", {"language": False})
        config = DataConfig.model_validate({"sources": ["unused"], **settings})
        out = tmp_path / name
        return curate(config, sources, plain_tokenizer, 512, out, None, **other), out

    return curate_here


def sums(count: int, start: int = 0, **fields: Any) -> list[dict[str, Any]]:
    return [
        {"instruction": f"What is {n} + {n}?", "output": f"it is {2 * n}.", **fields}
        for n in range(start, start + count)
    ]


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    files = [folder / f"{name}.parquet"] if name in ("dropped", "quarantine") else shard_files(folder, name)
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def prompts(folder: Path) -> dict[str, str]:
    """The side of every opening prompt."""
    return {row["messages"][0]["content"]: side for side in SIDES for row in table(folder, side)}


def everything_in(folder: Path) -> str:
    """All that lies in the folder, Parquet as the text of its rows."""
    texts = [
        str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else path.read_text(errors="replace")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return "\n".join(texts)


def dropped_by(folder: Path, rule: str) -> list[dict[str, Any]]:
    return [drop for drop in table(folder, "dropped") if drop["rule"] == rule]


def test_secrets_are_redacted_before_duplicates_are_looked_for(run: Run, write_jsonl: WriteJsonl) -> None:
    other = "AKIA" + "Z7KD2MLPQ3EGRT5W"
    planted = [
        {"instruction": "Where is the key?", "output": f"Use {key} now.", "generator": f"bot {key}"}
        for key in (KEY, other)
    ]
    path = write_jsonl([*sums(60), *planted])
    curation, out = run(path)
    assert curation["personal_data"]["redacted"] == {"rows": 2, "counts": {"AWS_KEY": 4}}
    assert curation["reasons"] == {"duplicate": 1}
    assert KEY not in everything_in(out)
    assert other not in everything_in(out)
    _, kept = run(path, name="kept", policy={"secrets": "keep"})
    assert KEY in everything_in(kept), "nothing was planted"


def test_what_the_policy_keeps_stands_in_rows_and_in_no_report(run: Run, write_jsonl: WriteJsonl) -> None:
    rows = [
        {"instruction": f"Write to person {n}?", "output": f"Write to {MAIL}.", "generator": MAIL} for n in range(60)
    ]
    curation, out = run(write_jsonl(rows), near_duplicates={"action": "none"})
    assert curation["personal_data"]["rows"] == curation["rows"]["kept"] == 60
    assert MAIL in str(table(out, "train"))
    assert MAIL not in (out / "curation.json").read_text()
    assert MAIL not in (out / "card.md").read_text()
    assert len(curation["samples"]) == 20


def test_policy_reads_tags_and_drops(run: Run, write_jsonl: WriteJsonl) -> None:
    rows = [*sums(60, licence="mit"), *sums(10, 100, licence="cc-by-nc-4.0")]
    rows += [{"instruction": f"Fill in {n}?", "output": "Dear {{name}}, hello.", "licence": "mit"} for n in range(3)]
    policy = {"licence": "commercial", "placeholders": "drop", "scores": {"answer_words": {"max": 3}}}
    curation, out = run(
        write_jsonl(
            [*rows, *({"instruction": "Say it at length?", "output": "one two three four", "licence": "mit"},)]
        ),
        policy=policy,
    )
    assert curation["reasons"] == {"licence": 10, "placeholder": 3, "score:answer_words": 1}
    assert [drop["score"] for drop in dropped_by(out, "score:answer_words")] == [4.0]


def test_tags_of_kept_rows_alone_are_summed_up_and_stand_beside_them(run: Run, write_jsonl: WriteJsonl) -> None:
    curation, out = run(write_jsonl([*sums(60), *sums(60)]), selection={"budget_rows": 5})
    kept = [row for side in SIDES for row in table(out, side)]
    assert len(kept) == curation["rows"]["kept"] < 60
    assert all(row["tag_answer_words"] == 3 and row["tag_injection"] is False for row in kept)
    assert curation["tags"]["injection"] == {"missing": 0, "flagged": 0}
    assert sum(curation["tags"]["licence_class"]["values"].values()) == len(kept)


def test_rows_that_hold_evaluation_items_are_dropped_with_evidence(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    items = [{"question": STORY.format(n=n, m=n // 2), "answer": "some"} for n in (12, 40)]
    path = write_jsonl([*sums(60), {"instruction": STORY.format(n=12, m=6).upper(), "output": "6"}])
    sets = write_jsonl(items, "eval.jsonl")
    curation, out = run(path, prompt_sets=[sets])
    [drop] = dropped_by(out, "contamination")
    assert drop["matched_id"] == "eval.jsonl/1"
    assert curation["contamination"]["sets"][0]["rows_dropped"] == 1
    assert curation["contamination"]["hits"][0]["coverage"] == 1.0
    assert run(path, name="without")[0]["reasons"] == {}
    reported, _ = run(path, name="reported", prompt_sets=[sets], decontaminate={"action": "report"})
    assert reported["reasons"] == {}
    assert len(reported["contamination"]["hits"]) == len(curation["contamination"]["hits"])


def near_copies() -> list[dict[str, Any]]:
    """Thirty rows and a near-copy of each, of another opening word and so, mostly, on another side of the split."""
    words = [
        f"w{n} in the long and winding road of stories about number {n} that we tell to children at night"
        for n in range(30)
    ]
    return [
        {"instruction": f"{opening} {text}?", "output": f"{text} and so on"}
        for text in words
        for opening in ("Tell", "Say")
    ]


def test_near_duplicates_leave_one_or_are_reported_and_kept_on_one_side(run: Run, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl([*sums(60), *near_copies()])
    curation, out = run(path)
    assert curation["reasons"] == {"near_duplicate": 30}
    kept = {row["id"] for side in SIDES for row in table(out, side)}
    assert all(drop["matched_id"] in kept and drop["score"] >= 0.8 for drop in dropped_by(out, "near_duplicate"))
    reported, out = run(path, name="reported", near_duplicates={"action": "report"})
    assert reported["near_duplicates"]["clusters"] == 30
    assert set(reported["reasons"]) == {"leak"}, "no pair lies on two sides; plant more"
    off, _ = run(path, name="off", near_duplicates={"action": "none"})
    assert off["rows"]["kept"] == 120


def test_rows_of_an_earlier_set_stay_where_they_were(run: Run, write_jsonl: WriteJsonl) -> None:
    old = write_jsonl([*sums(60), *near_copies()[::2]], "old.jsonl")
    new = write_jsonl(near_copies()[1::2], "new.jsonl")
    _, first = run(old, name="first")
    _, second = run(new, old, name="second", earlier=first)
    assert prompts(second) == prompts(first)
    _, alone = run(new, old, name="alone")
    assert prompts(alone) != prompts(first), "nothing would have moved"


def test_selection_writes_a_control_beside_the_chosen_rows(run: Run, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(sums(120))
    curation, out = run(path, selection={"budget_rows": 20, "clusters": 4, "quality": "answer_words"})
    whole, _ = run(path, name="whole")
    left_out = whole["splits"]["train"] - 20
    assert (curation["splits"]["train"], curation["reasons"]) == (20, {"not_selected": left_out})
    [control] = out.glob("control-*.parquet")
    chosen = {row["id"] for row in table(out, "train")}
    drawn = {row["id"] for row in pq.read_table(control).to_pylist()}
    other, trained = run(
        path,
        name="other",
        selection={"budget_rows": 20, "clusters": 4, "quality": "answer_words", "train_on": "control"},
    )
    assert {row["id"] for row in table(trained, "train")} == drawn != chosen
    assert other["digest"] != curation["digest"]


def test_packs_hold_every_training_row_once(run: Run, write_jsonl: WriteJsonl) -> None:
    curation, out = run(write_jsonl(sums(80)), packing={"enabled": True})
    packs = read_packs(out)
    assert packs is not None
    assert sorted(row for pack in packs for row in pack) == [row["id"] for row in table(out, "train")]
    assert curation["packing"]["sequences"] == len(packs) < len(table(out, "train"))


def test_shards_hold_no_more_rows_than_asked_for_and_the_same_rows(run: Run, write_jsonl: WriteJsonl) -> None:
    path = write_jsonl(sums(80))
    whole, one = run(path, name="one")
    parts, many = run(path, name="many", shard_rows=20)
    assert [pq.read_metadata(file).num_rows for file in shard_files(many, "train")][:-1] == [20] * (
        len(shard_files(many, "train")) - 1
    )
    assert table(many, "train") == table(one, "train")
    assert parts["digest"] == whole["digest"]


def test_second_run_tags_what_is_new_alone_and_says_the_same(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TagCache(FolderShelf(tmp_path / "tags"))
    run(write_jsonl(sums(60), "old.jsonl"), tag_cache=cache)
    with caplog.at_level(logging.INFO):
        run(write_jsonl(sums(63)), name="warm", tag_cache=cache)
    assert "proof 3 (60 more found)" in caplog.text
    run(write_jsonl(sums(63)), name="cold")
    assert everything_in(tmp_path / "warm") == everything_in(tmp_path / "cold")


def test_rejected_answers_are_kept_and_tell_rows_apart(run: Run, write_jsonl: WriteJsonl) -> None:
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": bad}
        for n in range(40)
        for bad in ("No.", "Who knows.")
    ]
    curation, out = run(write_jsonl(rows), near_duplicates={"action": "none"})
    assert curation["rows"]["kept"] == 80
    assert {row["rejected"] for side in SIDES for row in table(out, side)} == {"No.", "Who knows."}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"policy": {"scores": {"beauty": {"min": 1}}}}, "beauty"),
        ({"policy": {"languages": ["klingon"]}}, "klingon"),
        ({"selection": {"budget_rows": 5, "quality": "beauty"}}, "beauty"),
        ({"tags": {"plugins": ["absent_module:score"]}}, "absent_module"),
    ],
)
def test_wrong_setting_is_told_before_anything_is_read(run: Run, tmp_path: Path, settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run(tmp_path / "absent.jsonl", **settings)


def test_evaluation_set_that_is_not_there_is_named_with_its_setting(
    run: Run, write_jsonl: WriteJsonl, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl(.|\n)*evaluate\.prompt_sets"):
        run(write_jsonl(sums(40)), prompt_sets=[tmp_path / "absent.jsonl"])


def test_settings_stand_in_the_document_without_paths(run: Run, write_jsonl: WriteJsonl) -> None:
    curation, out = run(write_jsonl(sums(60)))
    assert curation["config"]["near_duplicates"]["threshold"] == 0.8
    assert not {"sources", "chat_template"} & set(curation["config"])
    assert str(out.parent) not in json.dumps(curation)
