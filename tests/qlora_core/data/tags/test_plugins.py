"""Functions of the user's own: asked in batches, checked, and never believed blindly."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_core.data.row import Row
from qlora_core.data.tags.plugins import PluginTagger
from qlora_core.errors import ConfigError

SOURCE = """
def length(texts):
    return [len(text) / 10 for text in texts]

def picky(texts):
    if any("bad" in text for text in texts):
        raise RuntimeError("the text is " + texts[0])
    return [1 for _ in texts]

def odd(texts):
    return [None if "none" in text else float("nan") for text in texts]

def short(texts):
    return [0.0]

def words(texts):
    return ["high" for _ in texts]

def flags(texts):
    return [True for _ in texts]

def one(texts):
    return 1.0

number = 3
"""


@pytest.fixture
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "my_scores_of_tests.py"
    path.write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return path


def test_scores_get_the_functions_name(scores: Path, row: Callable[..., Row]) -> None:
    made = PluginTagger("my_scores_of_tests:length").tag([row("abc", "de"), row("a", "b")])
    assert made.table.to_pylist() == [{"length": 0.7}, {"length": 0.4}]


def test_a_text_that_fails_costs_only_its_own_score(
    scores: Path, row: Callable[..., Row], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        made = PluginTagger("my_scores_of_tests:picky").tag([row("good", "x"), row("bad", "y"), row("good", "z")])
    assert made.table.column("picky").to_pylist() == [1.0, None, 1.0]
    assert made.failed.tolist() == [False, True, False]
    assert "bad" not in caplog.text


def test_nan_is_a_failure_and_none_an_answer(scores: Path, row: Callable[..., Row]) -> None:
    made = PluginTagger("my_scores_of_tests:odd").tag([row("none", "x"), row("some", "y")])
    assert made.table.column("odd").to_pylist() == [None, None]
    assert made.failed.tolist() == [False, True]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "was given 2 texts and returned list \\(1 of them\\)"),
        ("words", "a score of type str"),
        ("flags", "a score of type bool"),
        ("one", "returned float \\(no list\\)"),
    ],
)
def test_answers_of_another_shape_are_refused(
    scores: Path, row: Callable[..., Row], function: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        PluginTagger(f"my_scores_of_tests:{function}").tag([row("a", "b"), row("c", "d")])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("toxicity", "is not of the form module:function"),
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
        ("my_scores_of_tests:tox", "has no function 'tox'; it has flags, length"),
        ("my_scores_of_tests:number", "has no function 'number'"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_once(scores: Path, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PluginTagger(spec)


def test_an_edited_plugin_has_another_fingerprint(scores: Path) -> None:
    before = PluginTagger("my_scores_of_tests:length").fingerprint
    assert PluginTagger("my_scores_of_tests:picky").fingerprint != before
    scores.write_text(SOURCE + "\n# another threshold\n")
    assert PluginTagger("my_scores_of_tests:length").fingerprint != before
