"""A tokenizer that loses characters is found out, and the characters are named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_core.data.chat_template import ChatTokenizer, load_chat_tokenizer
from qlora_core.data.loss_mask import Refusal, mask_rows
from qlora_core.data.proof_tags import PROOF_SCHEMA, check_proofs, is_over_long, prove_rows
from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.tokenizer_proof import check_tokenizer, lossy_characters, name_characters
from qlora_core.errors import MaskError

PLAIN_WORDS = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:?!\n"
MakeTokenizer = Callable[[str], Path]


def exchange(prompt: str, answer: str, line: int = 1) -> Row:
    return make_row(Draft([Message("user", prompt), Message("assistant", answer, train=True)]), "rows.jsonl", line)


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> MakeTokenizer:
    """A function that saves a real BPE without byte fallback, which knows only the characters given."""

    def make(alphabet: str, unknown: str | None = "<unk>") -> Path:
        tokenizer = Tokenizer(models.BPE(unk_token=unknown))
        tokenizer.decoder = decoders.Fuse()
        specials = ["<end>", *([unknown] if unknown else [])]
        trainer = trainers.BpeTrainer(
            vocab_size=len(alphabet) + 10, initial_alphabet=list(alphabet), special_tokens=specials, show_progress=False
        )
        tokenizer.train_from_iterator([alphabet], trainer)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token=unknown)
        fast.chat_template = PLAIN_WORDS
        fast.save_pretrained(str(tmp_path))
        return tmp_path

    return make


@pytest.fixture
def lossy(make_tokenizer: MakeTokenizer) -> ChatTokenizer:
    """It knows neither `#` nor `é`."""
    return load_chat_tokenizer(make_tokenizer(LETTERS))


def refusal(chat: ChatTokenizer, row: Row) -> Refusal:
    [outcome] = mask_rows(chat, [row])
    assert isinstance(outcome, Refusal), outcome
    return outcome


def test_row_that_loses_characters_names_them(lossy: ChatTokenizer) -> None:
    found = refusal(lossy, exchange("What is a cafe?", "A café is # one."))

    assert (found.rule, found.lost) == ("not_round_trip", "#é")
    assert "'#' (U+0023), 'é' (U+00E9)" in found.detail
    assert "café" not in found.detail


def test_loss_in_the_prompt_counts_as_well(lossy: ChatTokenizer) -> None:
    assert refusal(lossy, exchange("What is a café?", "A place.")).lost == "é"


def test_answer_of_nothing_but_lost_characters_names_them(make_tokenizer: Callable[..., Path]) -> None:
    chat = load_chat_tokenizer(make_tokenizer(LETTERS, None))

    assert refusal(chat, exchange("Which one?", "é#é")).lost == "#é"


def test_unknown_word_blames_the_character_not_its_neighbours(tmp_path: Path) -> None:
    vocabulary = {word: place for place, word in enumerate(["<unk>", "<end>", "one", "t", "w", "o"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    from qlora_core.data.tokenizer_proof import lost_characters

    class Codec:
        def encode(self, texts: list[str]) -> list[list[int]]:
            return [fast(text, add_special_tokens=False)["input_ids"] for text in texts]

        def decode(self, ids: list[list[int]]) -> list[str]:
            return fast.batch_decode(ids)

    # "twé" becomes <unk> as a whole; t and w are known when they stand alone.
    assert lost_characters(Codec(), "one twé", "one <unk>") == "é"  # pyright: ignore[reportArgumentType]


def test_tokenizer_that_loses_what_the_template_writes_is_refused_at_once(make_tokenizer: MakeTokenizer) -> None:
    folder = make_tokenizer(LETTERS.replace("W", "").replace(";", ""))

    with pytest.raises(
        MaskError, match=r"loses characters of what the chat template \(tokenizer\) writes: ';' \(U\+003B"
    ):
        load_chat_tokenizer(folder)


def test_too_many_lossy_rows_are_refused_with_characters_counts_and_next_step(lossy: ChatTokenizer) -> None:
    rows = [exchange("Say it.", text) for text in ("café", "née", "a # b", *["plain"] * 7)]

    with pytest.raises(
        MaskError,
        match=r"3 of 10 rows, a share of 0\.300; 0\.25 is allowed\. Lost: 'é' \(U\+00E9\) in 2 rows, "
        r"'#' \(U\+0023\) in 1 rows\. Use a base model whose tokenizer knows every byte",
    ):
        check_tokenizer(lossy, rows, 0.25)
    check_tokenizer(lossy, rows, 0.3)


def test_quick_look_and_proof_agree_on_rows_and_characters(lossy: ChatTokenizer) -> None:
    rows = [exchange("Say it.", text) for text in ("café", "née", "a # b", *["plain"] * 7)]
    proofs = prove_rows(lossy, rows)

    for check in (lambda: check_tokenizer(lossy, rows), lambda: check_proofs(lossy, proofs, rows)):
        with pytest.raises(MaskError, match=r"3 of 10 rows.* 'é' \(U\+00E9\) in 2 rows, '#' \(U\+0023\) in 1 rows\."):
            check()
    check_proofs(lossy, proofs, rows, max_lossy_share=0.3)


def test_byte_level_tokenizer_loses_nothing(plain_tokenizer: Path) -> None:
    chat = load_chat_tokenizer(plain_tokenizer)
    every_kind = ["#", "é", "\u0301", "\u200b", "你", "🙂", "\x07", "ﷺ", "\U0010fffd"]

    assert lossy_characters(chat, every_kind) == []
    check_tokenizer(chat, [exchange("".join(every_kind), "x")], 0)
    check_tokenizer(chat, [], 0)


def test_names_show_what_cannot_be_seen_and_stop_at_a_dozen() -> None:
    assert (
        name_characters("é\u0301\x07") == "'é' (U+00E9), COMBINING ACUTE ACCENT (U+0301), a control character (U+0007)"
    )
    assert name_characters(map(chr, range(0x4E00, 0x4E00 + 20))).endswith(" and 8 more")


def test_proofs_are_one_line_a_row_with_lengths_as_masked(plain_tokenizer: Path) -> None:
    chat = load_chat_tokenizer(plain_tokenizer)
    rows = [exchange("a", "b"), exchange("a", "b<|end|>"), exchange("a", "word " * 50 + "end")]
    masked = mask_rows(chat, rows)

    proofs = prove_rows(chat, rows).to_pylist()

    for proof, one in zip(proofs, masked, strict=True):
        if isinstance(one, Refusal):
            assert (proof["tokens"], proof["trained"], proof["rule"]) == (None, None, "special_token_text")
        else:
            assert (proof["tokens"], proof["trained"]) == (len(one.input_ids), sum(one.loss_mask))
            assert (proof["answer_start"], proof["rule"]) == (one.loss_mask.index(True), None)
    assert prove_rows(chat, []).schema == PROOF_SCHEMA


@pytest.mark.parametrize("over_long", ["drop", "cut"])
def test_window_on_kept_columns_is_that_of_the_proof_itself(plain_tokenizer: Path, over_long: str) -> None:
    chat = load_chat_tokenizer(plain_tokenizer)
    rows = [exchange("a" * (1 + n % 40), "b " * n + "b") for n in range(1, 60)] + [exchange("a", "b<|end|>")]
    stored = prove_rows(chat, rows)

    for limit in (8, 20, 35, 70, 4000):
        fresh = prove_rows(chat, rows, limit, over_long)  # pyright: ignore[reportArgumentType]
        over = np.array([rule == "over_long" for rule in fresh.column("rule").to_pylist()])
        assert np.array_equal(is_over_long(stored, limit, over_long), over)  # pyright: ignore[reportArgumentType]
        kept = [p["tokens"] for p in fresh.to_pylist() if p["rule"] is None]
        assert all(tokens <= limit for tokens in kept)


def test_template_at_fault_is_named_with_its_first_row(plain_tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}{% if m.content == 'x' %}{{ raise_exception('no x') }}{% endif %}"
        "[{{ m.role }}]\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    chat = load_chat_tokenizer(plain_tokenizer, file)
    rows = [exchange("a", "b", 1), exchange("x", "b", 2), exchange("x", "b", 3)]
    proofs = prove_rows(chat, rows)

    with pytest.raises(MaskError, match=r"failed on 2 of 3 rows, first on rows\.jsonl, line 2: .*no x"):
        check_proofs(chat, proofs, rows)
    check_proofs(chat, proofs, rows, max_unproven_share=0.7)
