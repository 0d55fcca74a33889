"""The whole stage on small files: funnel, split, leaks, digest, refusals; and on the real data sets."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_core.config.curation import SplitConfig
from qlora_core.config.data import DataConfig
from qlora_core.data.chat_template import load_chat_tokenizer
from qlora_core.data.curate import curate
from qlora_core.data.dataset import read_prompts, read_split
from qlora_core.data.leak_gate import check_no_leaks
from qlora_core.data.shards import shard_files
from qlora_core.data.split import SIDES, side_of
from qlora_core.errors import DataError, MaskError

WriteJsonl = Callable[..., Path]


def config(**values: Any) -> DataConfig:
    return DataConfig(sources=["unused"], **values)


def sums(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"instruction": f"What is {n} + {n}?", "output": f"the answer is {2 * n}.", "category": "sums"}
        for n in range(start, start + count)
    ]


def run(out: Path, tokenizer: Path, *sources: Path, **values: Any) -> dict[str, Any]:
    return curate(config(**values), sources, tokenizer, 512, out, None)


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    files = shard_files(folder, name) if name in SIDES else [folder / f"{name}.parquet"]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def sides(folder: Path) -> dict[str, str]:
    """The side of every prompt."""
    return {row["messages"][0]["content"]: side for side in SIDES for row in table(folder, side)}


def test_every_row_is_accounted_for(tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl) -> None:
    rows = sums(60)
    bad = ["{broken", {"instruction": "a", "output": ""}, {"instruction": 5, "output": "b"}]
    long = {"instruction": "Long?", "output": "word " * 500}
    special = {"instruction": "What does <|end|> mean?", "output": "The end."}
    path = write_jsonl([*rows, *bad, rows[0], rows[1], long, special])

    curation = run(tmp_path / "out", plain_tokenizer, path)

    assert curation["rows"] == {"in": 67, "kept": 60, "dropped": 4, "quarantined": 3}
    assert curation["reasons"] == {"duplicate": 2, "over_long": 1, "special_token_text": 1}
    assert curation["quarantine_reasons"] == {"empty answer": 1, "not JSON": 1, "wrong type": 1}
    assert sum(curation["splits"].values()) == 60
    assert curation == json.loads((tmp_path / "out/curation.json").read_text())
    dropped = table(tmp_path / "out", "dropped")
    assert [(drop["line"], drop["rule"]) for drop in dropped] == [
        (64, "duplicate"),
        (65, "duplicate"),
        (66, "over_long"),
        (67, "special_token_text"),
    ]
    assert dropped[2]["tokens"] > 512
    assert {drop["matched_id"] for drop in dropped[:2]} <= {
        row.id for side in SIDES for row in read_split(tmp_path / "out", side)
    }
    assert [(entry["file"], entry["line"]) for entry in table(tmp_path / "out", "quarantine")] == [
        ("rows.jsonl", 61),
        ("rows.jsonl", 62),
        ("rows.jsonl", 63),
    ]


def test_token_rows_and_prompts_fit_together(tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl) -> None:
    out = tmp_path / "out"
    run(out, plain_tokenizer, write_jsonl(sums(60)))
    chat = load_chat_tokenizer(out / "tokenizer")

    for side in SIDES:
        tokens, prompts = read_split(out, side), read_prompts(out, side)
        assert [row.id for row in tokens] == sorted(row.id for row in prompts)
        for row, prompt in zip(tokens, prompts, strict=True):
            assert len(row.input_ids) == len(row.loss_mask)
            [opening] = chat.encode([prompt.prompt])
            assert row.input_ids[: len(opening)] == opening
            trained = [i for i, counts in zip(row.input_ids, row.loss_mask, strict=True) if counts]
            assert chat.decode([trained]) == [prompt.reference + chat.stop_token]
            assert prompt.category == "sums"
    assert read_prompts(out, "test", 2) == read_prompts(out, "test")[:2]


def test_two_runs_are_byte_equal_wherever_the_files_lie(
    tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl
) -> None:
    rows = [*sums(40), "{broken", sums(1)[0]]
    for place in ("here", "there"):
        run(tmp_path / place / "out", plain_tokenizer, write_jsonl(rows, f"{place}/rows.jsonl"))

    one, other = (
        {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "here/out", tmp_path / "there/out")
    )
    assert one == other
    assert {"card.md", "curation.json", "dropped.parquet", "tokenizer/tokenizer.json"} <= set(one)
    assert {f"{side}-00000-of-00001.parquet" for side in SIDES} <= set(one)


def test_digest_is_free_of_line_order_and_file_name_but_not_of_content(
    tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl
) -> None:
    rows = [*sums(40), {**sums(1)[0], "instruction": "What is  0 + 0?"}]
    shuffled = random.Random(0).sample(rows, len(rows))
    changed = [{**rows[0], "output": "Nothing."}, *rows[1:]]

    digests = [
        run(tmp_path / name, plain_tokenizer, write_jsonl(some, f"{name}.jsonl"))["digest"]
        for name, some in (("a", rows), ("b", shuffled), ("c", changed))
    ]

    assert digests[0] == digests[1] != digests[2]


def test_added_rows_move_nobody(tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl) -> None:
    run(tmp_path / "few", plain_tokenizer, write_jsonl(sums(50), "few.jsonl"))
    run(tmp_path / "many", plain_tokenizer, write_jsonl([*sums(30, 50), *sums(50)], "many.jsonl"))

    few, many = sides(tmp_path / "few"), sides(tmp_path / "many")
    assert {prompt: many[prompt] for prompt in few} == few


def test_equal_prompts_with_other_answers_stay_together(
    tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl
) -> None:
    rows = [{**row, "output": f"{row['output']} {word}"} for row in sums(40) for word in ("Sure.", "Yes.", "Right.")]

    curation = run(tmp_path / "out", plain_tokenizer, write_jsonl(rows))

    assert curation["rows"]["kept"] == 120
    prompts = [{row["messages"][0]["content"] for row in table(tmp_path / "out", side)} for side in SIDES]
    assert sum(map(len, prompts)) == 40


def test_planted_leaks_are_dropped_from_train_and_name_what_they_match(
    tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl
) -> None:
    clean = tmp_path / "clean"
    run(clean, plain_tokenizer, write_jsonl(sums(60), "clean.jsonl"))
    held = {row["messages"][0]["content"]: row["id"] for side in SIDES[1:] for row in table(clean, side)}
    openings = [f"Hello {number}." for number in range(60) if side_of(f"hello {number}", config().split) == "train"]
    planted = [
        {
            "messages": [
                {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, turns, strict=True)
            ]
        }
        for opening, prompt in zip(openings, held, strict=False)
        for turns in [(opening, "Hi.", f"{prompt.upper().rstrip('?')} !", "No idea.")]
    ]
    assert len(planted) >= 5

    paths = [write_jsonl(sums(60), "clean.jsonl"), write_jsonl(planted, "planted.jsonl")]
    curation = run(tmp_path / "out", plain_tokenizer, *paths)

    leaks = [drop for drop in table(tmp_path / "out", "dropped") if drop["rule"] == "leak"]
    assert curation["reasons"]["leak"] == len(leaks) == len(planted)
    assert {leak["matched_id"] for leak in leaks} <= set(held.values())
    check_no_leaks(tmp_path / "out")


def test_cut_rows_end_without_a_stop_token(tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl) -> None:
    rows = [{"instruction": f"Count to {n}.", "output": "one " * 200} for n in range(40)]
    out = tmp_path / "out"

    curation = run(out, plain_tokenizer, write_jsonl(rows), max_tokens=100, over_long="cut")
    chat = load_chat_tokenizer(out / "tokenizer")

    assert curation["rows"]["kept"] == 40
    for row in read_split(out, "train"):
        assert len(row.input_ids) == len(row.loss_mask) == 100
        assert chat.stop_token_id not in row.input_ids
        assert row.loss_mask[-1]


def test_window_is_the_models_when_that_is_smaller(
    tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl([*sums(60), {"instruction": "Long?", "output": "word " * 30}])

    curation = curate(config(max_tokens=4096), [path], plain_tokenizer, 90, tmp_path / "out", None)

    assert curation["max_tokens"] == 90
    assert curation["reasons"] == {"over_long": 1}


def test_samples_show_trained_parts_of_real_rows(
    tmp_path: Path, chatml_tokenizer: Path, write_jsonl: WriteJsonl
) -> None:
    curation = run(tmp_path / "out", chatml_tokenizer, write_jsonl(sums(40)))

    assert len(curation["samples"]) == 20
    sample = curation["samples"][0]["text_parts"]
    assert [part["trained"] for part in sample] == [False, True, False]
    assert sample[0]["text"].startswith("<|im_start|>user\nWhat is")
    assert sample[1]["text"].endswith(".<|im_end|>")
    assert curation["chat_template"] == {"origin": "tokenizer", "stop_token": "<|im_end|>", "bos_added": False}


def test_empty_after_curation_shows_the_funnel_and_the_next_step(
    tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl
) -> None:
    with pytest.raises(
        DataError, match=r"no row is left after curation(.|\n)*over_long 60(.|\n)*raise data.max_tokens"
    ):
        run(tmp_path / "out", plain_tokenizer, write_jsonl(sums(60)), max_tokens=8)
    assert not (tmp_path / "out").exists()


def test_empty_split_is_named(tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl) -> None:
    with pytest.raises(DataError, match=r"no row is left for .*(validation|test)(.|\n)*data\.split"):
        run(tmp_path / "out", plain_tokenizer, write_jsonl(sums(2)))


def test_all_rows_quarantined_is_an_error_even_when_all_may_be(
    tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl
) -> None:
    path = write_jsonl([{"instruction": "a", "output": ""}] * 3)

    with pytest.raises(DataError, match="no row is left"):
        run(tmp_path / "out", plain_tokenizer, path, max_quarantined_share=1)
    with pytest.raises(DataError, match=r"3 of 3 rows cannot be used"):
        run(tmp_path / "out", plain_tokenizer, path)


def test_template_that_fails_on_rows_stops_the_stage(
    tmp_path: Path, plain_tokenizer: Path, write_jsonl: WriteJsonl
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )

    with pytest.raises(MaskError, match="token ids do not open the row"):
        curate(config(), [write_jsonl(sums(40))], plain_tokenizer, 512, tmp_path / "out", template)


def test_unknown_split_and_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'dev'.*train, validation, test"):
        read_split(tmp_path, "dev")
    with pytest.raises(DataError, match=r"train.*no such file"):
        read_split(tmp_path, "train")


QUESTIONS = [{"prompt": row["instruction"], "response": row["output"]} for row in sums(40)]
ROWS = st.lists(
    st.one_of(
        st.builds(lambda q, a: {"prompt": q, "response": a}, st.text(max_size=8), st.text(max_size=8)),
        st.builds(lambda q, a: {"prompt": q, "response": a}, st.sampled_from("abc"), st.sampled_from(["x", " x", "y"])),
        st.just({"prompt": "only"}),
        st.just("{"),
        st.integers(),
        st.just({"prompt": None, "response": 1}),
    ),
    max_size=25,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_funnel_adds_up_for_any_rows(
    rows: list[Any], tmp_path_factory: pytest.TempPathFactory, plain_tokenizer: Path
) -> None:
    # The sums are enough for each side of the split to have a row whatever else is there.
    folder = tmp_path_factory.mktemp("funnel")
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in [*rows, *QUESTIONS]]
    path.write_text("\n".join(lines))

    curation = run(folder / "out", plain_tokenizer, path, max_quarantined_share=1)

    counts = curation["rows"]
    assert counts["in"] == len(rows) + 40
    assert counts["in"] == counts["kept"] + counts["dropped"] + counts["quarantined"]
    assert counts["kept"] == sum(curation["splits"].values())
    assert counts["dropped"] == sum(curation["reasons"].values()) == len(table(folder / "out", "dropped"))
    assert counts["quarantined"] == len(table(folder / "out", "quarantine"))


@given(key=st.text(), salt=st.text(max_size=5), share=st.floats(0.01, 0.4))
def test_side_depends_on_key_and_config_alone_and_larger_tests_keep_their_rows(
    key: str, salt: str, share: float
) -> None:
    small = SplitConfig(validation=0.1, test=share, salt=salt)
    large = SplitConfig(validation=0.1, test=share * 1.5, salt=salt)

    assert side_of(key, small) == side_of(key, small)
    if side_of(key, small) == "test":
        assert side_of(key, large) == "test"


def test_shares_come_out_as_asked() -> None:
    split = SplitConfig(validation=0.2, test=0.1, salt="qlora")
    found = [side_of(f"prompt {n}", split) for n in range(5000)]

    # Four standard deviations of a share over 5000 draws are under 0.023.
    assert abs(found.count("validation") / 5000 - 0.2) < 0.023
    assert abs(found.count("test") / 5000 - 0.1) < 0.017


# Rows as counted in the files themselves; kept rows depend on the window, so only what does not is pinned.
REAL_SETS = {
    "oasst_en_100_tree.jsonl": (100, "oasst", 39),  # best paths, and those that end on the user
    "sharegpt_dummy_conversation.json": (500, "sharegpt", 0),
    "lf_v1_sft_demo.jsonl": (500, "messages", 0),
}


@pytest.mark.integration
@pytest.mark.parametrize("name", REAL_SETS)
def test_real_set_curates_for_a_real_tokenizer(name: str, shared_data: Path, tmp_path: Path) -> None:
    rows, form, trimmed = REAL_SETS[name]
    model = shared_data / "models/stories260K-hf"

    curation = curate(config(over_long="cut"), [shared_data / "sft" / name], model, 512, tmp_path, None)

    assert curation["rows"]["in"] == rows
    assert (curation["by_source"][name]["format"], curation["by_source"][name]["trimmed"]) == (form, trimmed)
    assert curation["chat_template"] == {"origin": "plain default", "stop_token": "</s>", "bos_added": True}
    assert not set(curation["reasons"]) - {"duplicate", "near_duplicate", "over_long", "leak"}
    assert curation["rows"]["quarantined"] == 0


@pytest.mark.integration
def test_real_gsm8k_keeps_the_final_answers(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "sft/gsm8k_train.jsonl").read_text().splitlines()[:1000]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("\n".join(lines))

    curation = curate(config(), [path], shared_data / "models/stories260K-hf", 512, tmp_path / "out", None)

    assert curation["rows"]["in"] == 1000
    assert set(curation["reasons"]) == {"over_long"}
    assert all("\n#### " in row.reference for row in read_prompts(tmp_path / "out", "test"))


@pytest.mark.integration
def test_real_wrapped_and_bare_rows_are_found_to_be_the_same(shared_data: Path, tmp_path: Path) -> None:
    sources = [shared_data / "sft/dolly_3k.json", shared_data / "sft/dolly_hhrlhf_small.jsonl"]

    curation = curate(config(over_long="cut"), sources, shared_data / "models/stories260K-hf", 512, tmp_path, None)

    # The data's description counts 184 pairs by exact text; a few more differ in spacing only.
    hits = [d for d in table(tmp_path, "dropped") if d["rule"] == "duplicate" and d["source"] == sources[1].name]
    assert 184 <= len(hits) < 200
    assert [counts["in"] for counts in curation["by_source"].values()] == [2996, 1000]
