"""Which tokens of a row carry loss, and the proof of it on that very row.

Each conversation is rendered whole, and once more up to each trained answer with the generation prompt. A row is used
only if, on its own tokens: the prompt's ids open the row's ids; the tokens from there to the stop token decode to the
assistant's text and the stop token; there is one BOS where the tokenizer wants one; nothing of the text was lost; at
least one token is trained. Knows nothing of splits or files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_core.data.chat_template import NEXT_STEP, ChatTokenizer
from qlora_core.data.row import Message, Row
from qlora_core.errors import MaskError

# A template that fails on more than this share of rows is at fault itself; on fewer, those rows are.
MAX_UNPROVEN_SHARE = 0.1
TEMPLATE_RULES = frozenset({"mask_unproven", "template_refused"})


@dataclass(frozen=True, slots=True)
class TrainedTurn:
    """An answer within the row's ids: tokens `start` to `stop` (the stop token's place, trained too)."""

    message_index: int
    prompt: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class MaskedRow:
    """A row in tokens. `loss_mask[i]` says whether `input_ids[i]` carries loss; the turns are in order."""

    row: Row
    input_ids: list[int]
    loss_mask: list[bool]
    turns: tuple[TrainedTurn, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that is not used, by which rule, and what was wrong; the detail quotes no conversation."""

    row: Row
    rule: str
    detail: str


@dataclass(frozen=True, slots=True)
class _Rendered:
    row: Row
    text: str
    prompts: dict[int, str]


def mask_rows(chat: ChatTokenizer, rows: Sequence[Row]) -> list[MaskedRow | Refusal]:
    """Each row with its proven mask, or why it has none; in the order given. One tokenizer call serves all rows."""
    rendered = [_render(chat, row) for row in rows]
    good = [one for one in rendered if isinstance(one, _Rendered)]
    ids = iter(chat.encode([text for one in good for text in (one.text, *one.prompts.values())]))
    placed: list[MaskedRow | Refusal] = []
    for one in rendered:
        if isinstance(one, Refusal):
            placed.append(one)
        else:
            row_ids, prompt_ids = next(ids), {index: next(ids) for index in one.prompts}
            placed.append(_place(chat, one, row_ids, prompt_ids))
    return _prove_texts(chat, rendered, placed)


def check_template(chat: ChatTokenizer, rows_seen: int, refusals: Sequence[Refusal], max_share: float) -> None:
    """Raises MaskError if the template failed on more than `max_share` (0 to 1) of the rows seen so far."""
    failed = [refusal for refusal in refusals if refusal.rule in TEMPLATE_RULES]
    if len(failed) > max_share * rows_seen:
        first = failed[0]
        raise MaskError(
            f"the chat template ({chat.origin}) cannot be masked: it failed on {len(failed)} of {rows_seen} rows, "
            f"first on {first.row.source}, line {first.row.line}: {first.detail}. {NEXT_STEP}"
        )


def text_parts(chat: ChatTokenizer, input_ids: list[int], loss_mask: list[bool]) -> list[tuple[str, bool]]:
    """The row's text cut where the mask changes, each part with its flag; decoded from the tokens themselves."""
    ends = [i for i in range(1, len(loss_mask)) if loss_mask[i] != loss_mask[i - 1]]
    bounds = [*ends, len(input_ids)]
    decoded = chat.decode([input_ids[:end] for end in bounds])
    parts = []
    before = ""
    for end, text in zip(bounds, decoded, strict=True):
        parts.append((text.removeprefix(before), bool(loss_mask[end - 1])))
        before = text
    return parts


def _render(chat: ChatTokenizer, row: Row) -> _Rendered | Refusal:
    found = next((hit for m in row.messages if (hit := chat.special_text.search(m.content))), None)
    if found:
        return Refusal(row, "special_token_text", f"a turn holds the special token {found[0]!r} as text")
    trained = [index for index, message in enumerate(row.messages) if message.train]
    try:
        text = chat.render(row.messages)
        prompts = {i: chat.render(row.messages[:i], add_generation_prompt=True) for i in trained}
    except MaskError as error:
        return Refusal(row, "template_refused", f"the template refuses it: {error.__cause__ or error}")
    for index, prompt in prompts.items():
        fault = _text_fault(chat, text, prompt, row.messages[index])
        if fault:
            return Refusal(row, "mask_unproven", f"turn {index + 1}: {fault}")
    return _Rendered(row, text, prompts)


def _text_fault(chat: ChatTokenizer, text: str, prompt: str, answer: Message) -> str | None:
    if not text.startswith(prompt):
        return "the rendered prompt does not open the rendered row"
    written = text[len(prompt) :].lstrip()
    if not written.startswith(answer.content):
        return "the assistant's text does not follow the generation prompt unchanged"
    if not written[len(answer.content) :].lstrip().startswith(chat.stop_token):
        return f"the stop token {chat.stop_token} does not follow the assistant's text"
    return None


def _place(
    chat: ChatTokenizer, rendered: _Rendered, ids: list[int], prompt_ids: dict[int, list[int]]
) -> MaskedRow | Refusal:
    """Find every answer among the row's ids and check what ids alone can show."""
    row = rendered.row
    mask = [False] * len(ids)
    turns = []
    for index, opening in prompt_ids.items():
        start = len(opening)
        if ids[:start] != opening:
            return Refusal(row, "mask_unproven", f"turn {index + 1}: the prompt's token ids do not open the row's ids")
        if chat.stop_token_id not in ids[start:]:
            return Refusal(
                row, "mask_unproven", f"turn {index + 1}: the stop token {chat.stop_token} is not among the ids"
            )
        stop = ids.index(chat.stop_token_id, start)
        if stop == start:
            return Refusal(row, "not_round_trip", f"turn {index + 1}: the tokenizer makes no token of the text")
        mask[start : stop + 1] = [True] * (stop + 1 - start)
        turns.append(TrainedTurn(index, rendered.prompts[index], start, stop))
    if chat.bos_token_id is not None:
        extra = 0 if chat.bos_token_id == chat.stop_token_id else ids.count(chat.bos_token_id) - 1
        if ids[0] != chat.bos_token_id or ids[1:2] == [chat.bos_token_id] or extra:
            return Refusal(
                row, "mask_unproven", f"the row must open with one BOS (id {chat.bos_token_id}), and hold no other"
            )
    return MaskedRow(row, ids, mask, tuple(turns))


def _prove_texts(
    chat: ChatTokenizer, rendered: Sequence[_Rendered | Refusal], placed: list[MaskedRow | Refusal]
) -> list[MaskedRow | Refusal]:
    """Decode what was placed and compare it with the text that was meant."""
    pieces = [
        piece
        for masked in placed
        if isinstance(masked, MaskedRow)
        for piece in (
            masked.input_ids,
            *(masked.input_ids[:end] for t in masked.turns for end in (t.start, t.stop + 1)),
        )
    ]
    decoded = iter(chat.decode(pieces))
    proven: list[MaskedRow | Refusal] = []
    for one, masked in zip(rendered, placed, strict=True):
        if isinstance(masked, Refusal) or isinstance(one, Refusal):
            proven.append(masked)
            continue
        whole = next(decoded)
        spans = [(next(decoded), next(decoded)) for _ in masked.turns]
        proven.append(_proof(chat, one, masked, whole, spans))
    return proven


def _proof(
    chat: ChatTokenizer, one: _Rendered, masked: MaskedRow, whole: str, spans: Sequence[tuple[str, str]]
) -> MaskedRow | Refusal:
    for turn, (before, through) in zip(masked.turns, spans, strict=True):
        answer = one.row.messages[turn.message_index].content
        trained = through[len(before) :] if through.startswith(before) else ""
        # Templates and decoders may put blanks between the parts; the answer itself has none at its ends.
        inner = trained.strip().removesuffix(chat.stop_token)
        if not trained.strip().endswith(chat.stop_token) or inner.strip() != answer:
            return Refusal(
                one.row, "not_round_trip", f"turn {turn.message_index + 1}: its trained tokens decode to another text"
            )
    # Decoders set blanks around special tokens; anything else that differs was lost by the tokenizer.
    if "".join(whole.split()) != "".join(one.text.split()):
        return Refusal(one.row, "not_round_trip", "the row's tokens decode to another text")
    return masked
