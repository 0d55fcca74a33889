"""What is trained, proven from the tokens; and which templates are refused."""

import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_core.data.chat_template import ChatTokenizer, load_chat_tokenizer
from qlora_core.data.loss_mask import MaskedRow, Refusal, check_template, encode_proven, mask_rows, text_parts
from qlora_core.data.row import Draft, Message, Row, make_row
from qlora_core.data.window import fit
from qlora_core.errors import DataError, MaskError, ModelError

TWO_ANSWERS = [
    Message("system", "Be brief."),
    Message("user", "What is alpha?"),
    Message("assistant", "A letter.", train=True),
    Message("user", "And beta?"),
    Message("assistant", "The next one.", train=True),
]


def row(*messages: Message) -> Row:
    return make_row(Draft(messages), "rows.jsonl", 1)


def exchange(prompt: str, answer: str) -> Row:
    return row(Message("user", prompt), Message("assistant", answer, train=True))


def mask(chat: ChatTokenizer, one: Row) -> MaskedRow:
    [masked] = mask_rows(chat, [one])
    assert isinstance(masked, MaskedRow), masked
    return masked


def trained_text(chat: ChatTokenizer, masked: MaskedRow) -> list[str]:
    return [text for text, trained in text_parts(chat, masked.input_ids, masked.loss_mask) if trained]


@pytest.fixture(scope="module")
def plain(plain_tokenizer: Path) -> ChatTokenizer:
    return load_chat_tokenizer(plain_tokenizer)


@pytest.fixture(scope="module")
def chatml(chatml_tokenizer: Path) -> ChatTokenizer:
    return load_chat_tokenizer(chatml_tokenizer)


def test_plain_default_trains_each_answer_with_its_stop_token(plain: ChatTokenizer) -> None:
    masked = mask(plain, row(*TWO_ANSWERS))

    assert (plain.origin, plain.stop_token) == ("plain default", "<|end|>")
    assert trained_text(plain, masked) == ["A letter.<|end|>", "The next one.<|end|>"]
    assert plain.decode([masked.input_ids]) == [
        "<|begin|>### System:\nBe brief.\n### User:\nWhat is alpha?\n### Assistant:\nA letter.<|end|>\n"
        "### User:\nAnd beta?\n### Assistant:\nThe next one.<|end|>\n"
    ]


def test_own_template_stop_token_is_what_it_writes_not_the_eos(chatml: ChatTokenizer) -> None:
    masked = mask(chatml, row(*TWO_ANSWERS))

    assert (chatml.origin, chatml.stop_token, chatml.bos_token_id) == ("tokenizer", "<|im_end|>", None)
    assert trained_text(chatml, masked) == ["A letter.<|im_end|>", "The next one.<|im_end|>"]


def test_untrained_answer_carries_no_loss(chatml: ChatTokenizer) -> None:
    messages = [*TWO_ANSWERS[:2], Message("assistant", "A letter."), *TWO_ANSWERS[3:]]

    assert trained_text(chatml, mask(chatml, row(*messages))) == ["The next one.<|im_end|>"]


def test_prompt_ids_open_the_row_and_the_first_loss_is_on_the_answer(plain: ChatTokenizer) -> None:
    masked = mask(plain, exchange("What is alpha?", "A letter."))
    prompt_ids = plain.encode([masked.turns[0].prompt])[0]

    assert masked.input_ids[: len(prompt_ids)] == prompt_ids
    assert masked.loss_mask.index(True) == len(prompt_ids)


def test_one_bos_though_the_template_writes_none(plain: ChatTokenizer) -> None:
    masked = mask(plain, exchange("a", "b"))

    assert plain.bos_added
    assert masked.input_ids.count(plain.bos_token_id or 0) == 1
    assert masked.input_ids[0] == plain.bos_token_id


def test_saved_tokenizer_renders_the_same(plain: ChatTokenizer, tmp_path: Path) -> None:
    plain.tokenizer.save_pretrained(str(tmp_path))
    again = load_chat_tokenizer(tmp_path)

    assert (again.origin, again.stop_token_id) == ("tokenizer", plain.stop_token_id)
    assert mask(again, row(*TWO_ANSWERS)).input_ids == mask(plain, row(*TWO_ANSWERS)).input_ids


@pytest.mark.parametrize("text", ["<|end|>", "see <|begin|> there", "a<|im_end|>"])
def test_special_token_text_in_a_turn_never_becomes_that_token(chatml: ChatTokenizer, text: str) -> None:
    outcomes = mask_rows(chatml, [exchange(text, "b"), exchange("a", f"b{text}"), exchange("a", "b")])

    assert [one.rule for one in outcomes if isinstance(one, Refusal)] == ["special_token_text"] * 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=6))
def test_trained_tokens_are_exactly_the_answers_and_stops_for_any_text(plain: ChatTokenizer, turns: list[str]) -> None:
    texts = [text.strip() for text in turns]
    if not all(texts) or any(c == "\0" or 0xD800 <= ord(c) <= 0xDFFF for text in texts for c in text):
        return
    if any(plain.special_text.search(text) for text in texts):
        return  # refused by a rule of its own, tested above
    messages = [Message("assistant" if i % 2 else "user", t, train=bool(i % 2)) for i, t in enumerate(texts)]
    one = row(*messages)

    [masked] = mask_rows(plain, [one])

    assert isinstance(masked, MaskedRow)
    assert trained_text(plain, masked) == [f"{m.content}<|end|>" for m in one.messages if m.train]


HEADED = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n"
TAIL = "\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
REFUSED_TEMPLATES = {
    "upper-cases the answer": HEADED + "{{ m.content | upper }}{{ eos_token }}" + TAIL,
    "cuts the answer's first letter": HEADED + "{{ m.content[1:] }}{{ eos_token }}" + TAIL,
    "drops the answer": HEADED + "{% if m.role == 'user' %}{{ m.content }}{% endif %}{{ eos_token }}" + TAIL,
    "writes no stop token": HEADED + "{{ m.content }}" + TAIL,
    "stops on plain text": HEADED + "{{ m.content }}###" + TAIL,
    "puts the answer first": (
        "{{ bos_token }}{% for m in messages | reverse %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}" + TAIL
    ),
    "ignores add_generation_prompt": HEADED + "{{ m.content }}{{ eos_token }}\n{% endfor %}",
    "is no Jinja": "{% for m in messages %}{{ m.content ",
    "reaches outside its sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "raises": "{{ raise_exception('not for you') }}",
    "divides by zero": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("case", REFUSED_TEMPLATES)
def test_template_that_cannot_be_masked_is_refused_with_the_next_step(
    case: str, plain_tokenizer: Path, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(REFUSED_TEMPLATES[case])

    with pytest.raises(MaskError, match=r"chat template \(file\).*data\.chat_template"):
        load_chat_tokenizer(plain_tokenizer, file)


def test_template_from_a_file_goes_before_the_tokenizers_own(chatml_tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(HEADED + "{{ m.content | trim }}{{ eos_token }}" + TAIL)

    chat = load_chat_tokenizer(chatml_tokenizer, file)

    assert (chat.origin, chat.stop_token) == ("file", "<|end|>")
    assert trained_text(chat, mask(chat, exchange("a", "It trims, the rows are trimmed."))) == [
        "It trims, the rows are trimmed.<|end|>"
    ]


ROW_FAULTS = {
    "two BOS": ("{{ bos_token }}" + HEADED + "{{ m.content }}{{ eos_token }}" + TAIL, "mask_unproven"),
    "generation prompt that ends in a blank": (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "mask_unproven",
    ),
    "refuses a system turn": (
        HEADED + "{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ m.content }}{{ eos_token }}" + TAIL,
        "template_refused",
    ),
    "forgets earlier answers": (
        HEADED + "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}{{ eos_token }}" + TAIL,
        "mask_unproven",
    ),
}


@pytest.mark.parametrize("case", ROW_FAULTS)
def test_fault_that_only_rows_show_is_found_on_the_rows(case: str, plain_tokenizer: Path, tmp_path: Path) -> None:
    template, rule = ROW_FAULTS[case]
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    chat = load_chat_tokenizer(plain_tokenizer, file)

    # The tokenizer knows " the" as one token, so a blank before it does not stay on the prompt's side.
    messages = [*TWO_ANSWERS[:-1], Message("assistant", "the next one.", train=True)]
    outcomes = mask_rows(chat, [row(*messages)] * 3)
    refusals = [one for one in outcomes if isinstance(one, Refusal)]

    assert [one.rule for one in refusals] == [rule] * 3
    check_template(chat, 300, refusals, 0.1)
    with pytest.raises(MaskError, match=r"failed on 3 of 3 rows, first on rows\.jsonl, line 1"):
        check_template(chat, 3, refusals, 0.1)


def test_tokenizer_that_loses_characters_drops_the_row(plain: ChatTokenizer, tmp_path: Path) -> None:
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    plain.tokenizer.save_pretrained(str(tmp_path))
    lossy = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    lossy.backend_tokenizer.normalizer = normalizers.Replace("ö", "")
    lossy.save_pretrained(str(tmp_path))
    chat = load_chat_tokenizer(tmp_path)

    outcomes = mask_rows(chat, [exchange("a", "schön"), exchange("schön", "b"), exchange("a", "ö"), exchange("a", "b")])

    assert [one.rule for one in outcomes if isinstance(one, Refusal)] == ["not_round_trip"] * 3


def test_two_bos_are_one_too_many_where_the_tokenizer_adds_none(chatml_tokenizer: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ bos_token }}" + HEADED + "{{ m.content }}{{ eos_token }}" + TAIL)
    chat = load_chat_tokenizer(chatml_tokenizer, file)

    [refusal] = mask_rows(chat, [exchange("a", "b")])

    assert chat.bos_token_id is None
    assert isinstance(refusal, Refusal)
    assert refusal.detail == "the row opens with two BOS (id 0)"


def test_pad_token_that_is_the_stop_token_hides_no_label(plain: ChatTokenizer, tmp_path: Path) -> None:
    plain.tokenizer.save_pretrained(str(tmp_path))
    padded = load_chat_tokenizer(tmp_path)
    padded.tokenizer.pad_token = padded.tokenizer.eos_token

    masked = mask(padded, row(*TWO_ANSWERS))

    assert [masked.loss_mask[turn.stop] for turn in masked.turns] == [True, True]
    assert masked == mask(plain, row(*TWO_ANSWERS))


def test_rows_proven_before_come_out_the_same_without_another_proof(plain: ChatTokenizer) -> None:
    rows = [row(*TWO_ANSWERS), exchange("a", "ünïcode 你好 🙂"), row(*TWO_ANSWERS[:2], *TWO_ANSWERS[2:3])]

    assert encode_proven(plain, rows) == mask_rows(plain, rows)


def test_row_that_cannot_have_been_proven_is_no_row_of_the_record(chatml: ChatTokenizer) -> None:
    with pytest.raises(MaskError, match=r"rows\.jsonl, line 1 is on record as proven, but .*without the cached tags"):
        encode_proven(chatml, [exchange("a", "b"), exchange("a", "b<|im_end|>")])


def test_masks_do_not_depend_on_how_many_rows_come_together(
    plain: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(*TWO_ANSWERS), exchange("<|end|>", "b"), *(exchange(f"q {n}", "word " * n + "end") for n in range(9))]
    together = mask_rows(plain, rows)

    for size in ("PORTION_CHARACTERS", "PORTION_ROWS"):
        with monkeypatch.context() as patch:
            patch.setattr(f"qlora_core.data.loss_mask.{size}", 1)
            assert mask_rows(plain, rows) == together


def test_tokens_are_those_of_the_tokenizer_itself(plain: ChatTokenizer) -> None:
    texts = ["Alpha <|end|> beta", "  two  blanks ", "é\u0301🙂", "<|begin|><|begin|>x", ""]

    expected = [plain.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    assert plain.encode(texts) == expected


@pytest.mark.integration
def test_every_answer_of_real_conversations_is_trained_and_nothing_else(shared_data: Path) -> None:
    chat = load_chat_tokenizer(shared_data / "models" / "stories260K-hf")
    with (shared_data / "sft" / "sharegpt_dummy_conversation.json").open() as file:
        stored = json.load(file)[:120]
    roles: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
    rows = [
        row(*(Message(roles[t["from"]], t["value"].strip(), t["from"] == "gpt") for t in one["conversations"]))
        for one in stored
    ]

    for one, masked in zip(rows, mask_rows(chat, rows), strict=True):
        assert isinstance(masked, MaskedRow), masked
        answers = [f"{message.content}</s>" for message in one.messages if message.train]
        assert [text.strip() for text in trained_text(chat, masked)] == answers


def test_tokenizer_without_template_and_eos_is_refused(endless_tokenizer: Path) -> None:
    with pytest.raises(MaskError, match="neither a chat template nor an eos token"):
        load_chat_tokenizer(endless_tokenizer)


def test_folder_without_tokenizer_and_missing_template_file_are_named(plain_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_chat_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": [], "model": {"type": "Nope"}}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_chat_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"none\.jinja"):
        load_chat_tokenizer(plain_tokenizer, tmp_path / "none.jinja")


def test_row_that_fits_is_untouched(plain: ChatTokenizer) -> None:
    masked = mask(plain, row(*TWO_ANSWERS))

    assert fit(masked, len(masked.input_ids), "cut") is masked
    assert fit(masked, len(masked.input_ids) - 1, "drop") is None


def test_cut_keeps_the_start_and_trains_the_cut_answer_without_stop_token(plain: ChatTokenizer) -> None:
    masked = mask(plain, row(*TWO_ANSWERS))

    cut = fit(masked, masked.turns[1].stop, "cut")

    assert cut is not None
    assert trained_text(plain, cut) == ["A letter.<|end|>", "The next one."]
    assert cut.input_ids == masked.input_ids[: masked.turns[1].stop]


def test_cut_before_a_later_answer_ends_the_conversation_at_the_earlier_one(plain: ChatTokenizer) -> None:
    masked = mask(plain, row(*TWO_ANSWERS))

    cut = fit(masked, masked.turns[1].start, "cut")

    assert cut is not None
    assert [message.content for message in cut.row.messages] == ["Be brief.", "What is alpha?", "A letter."]
    assert trained_text(plain, cut) == ["A letter.<|end|>"]


def test_cut_drops_a_row_whose_prompt_fills_the_window(plain: ChatTokenizer) -> None:
    masked = mask(plain, row(*TWO_ANSWERS))

    assert fit(masked, masked.turns[0].start, "cut") is None
    assert fit(masked, masked.turns[0].start + 1, "cut") is not None
