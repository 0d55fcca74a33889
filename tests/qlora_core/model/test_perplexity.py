import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import DataError, ModelError
from qlora_core.model.base import load_any
from qlora_core.model.loss import sequence_losses
from qlora_core.model.perplexity import Window, score_text_file, split_windows, text_loss
from qlora_core.quantization.quantize import quantize_checkpoint


@given(length=st.integers(0, 200), window=st.integers(2, 50))
def test_windows_predict_every_token_but_the_first_once_with_context(length: int, window: int) -> None:
    windows = list(split_windows(range(length), window))
    counted = [token for row in windows for token, counts in zip(row.input_ids, row.loss_mask, strict=True) if counts]
    assert counted == list(range(1, length))
    for row in windows:
        assert len(row.input_ids) <= window
        first = row.loss_mask.index(True) if True in row.loss_mask else 0
        # Half a window of context, or all there is before the token
        assert first >= window // 2 or row.input_ids[0] == 0


def test_documents_are_scored_apart_each_from_its_bos(
    shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = text_loss(shared_model, tokenizer, "one\n<|endoftext|>\n\nthree<|endoftext|>  <|endoftext|>")
    rows = [Window([1, *tokenizer(text)["input_ids"]], [True] * (1 + len(text))) for text in ("one", "three")]
    expected = sequence_losses(shared_model, rows, batch_size=1)
    assert found.tokens == 8
    assert found.loss == pytest.approx(sum(nats for nats, _ in expected) / 8, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_text_longer_than_the_model_is_read_in_windows(
    shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "abcdefghij " * 30
    found = text_loss(shared_model, tokenizer, text)
    assert found.tokens == len(text.strip())
    # Less context changes the loss: the windows are really used
    assert text_loss(shared_model, tokenizer, text, window=4).loss != pytest.approx(found.loss, rel=1e-3)


@pytest.mark.parametrize("window", [1, 65])
def test_window_that_does_not_fit_is_refused(
    shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, window: int
) -> None:
    with pytest.raises(ModelError, match=f"a window of {window} tokens does not fit: 2 to 64"):
        text_loss(shared_model, tokenizer, "abc", window=window)


@pytest.mark.parametrize("text", ["", "  \n", "<|endoftext|>"])
def test_text_without_tokens_is_refused(
    shared_model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    with pytest.raises(DataError, match="no token to predict"):
        text_loss(shared_model, tokenizer, text)


def test_file_is_scored_with_and_without_an_adapter(
    nf4_folder: Path, write_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some words")
    alone, adapted = score_text_file(nf4_folder, file), score_text_file(nf4_folder, file, write_adapter())
    assert alone.tokens == adapted.tokens == 10
    assert alone.loss != pytest.approx(adapted.loss, rel=1e-4)


def test_unreadable_files_are_named(nf4_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*missing\.txt: No such file"):
        score_text_file(nf4_folder, tmp_path / "missing.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8 \\(byte 3\\)"):
        score_text_file(nf4_folder, tmp_path / "latin.txt")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[Path, str]:
    return shared_data / "models" / "stories260K-hf", (shared_data / "text" / "tinystories_sample.txt").read_text()


@pytest.mark.integration
def test_pretrained_model_scores_its_known_loss(stories: tuple[Path, str]) -> None:
    """1.2664 over 1,804 tokens: measured on this model and text independently of this project (the data's README)."""
    folder, text = stories
    found = text_loss(load_any(folder, device="cpu"), AutoTokenizer.from_pretrained(folder), text)
    assert found.tokens == 1804
    assert found.loss == pytest.approx(1.2664, abs=5e-5)


@pytest.mark.integration
@pytest.mark.parametrize(("double_quant", "loss"), [(True, 1.3791), (False, 1.3784)])
def test_quantized_pretrained_model_scores_its_known_loss(
    stories: tuple[Path, str], tmp_path: Path, double_quant: bool, loss: float
) -> None:
    """1.3791 with double quantization, 1.3784 without: same source as above."""
    folder, text = stories
    quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig(double_quant=double_quant))
    found = text_loss(load_any(tmp_path / "out", device="cpu"), AutoTokenizer.from_pretrained(tmp_path / "out"), text)
    assert found.tokens == 1804
    assert found.loss == pytest.approx(loss, abs=1e-4)
