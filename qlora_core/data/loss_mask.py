"""Which tokens of a row carry loss, and the proof of it on that very row.

Each conversation is rendered whole, and once more up to each trained answer with the generation prompt. A row is used
only if, on its own tokens: the prompt's ids open the row's ids; the tokens from there to the stop token decode to the
assistant's text and the stop token; there is one BOS where the tokenizer wants one; nothing of the text was lost; at
least one token is trained. Knows nothing of splits or files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qlora_core.data.chat_template import ChatTokenizer
from qlora_core.data.rendering import NEXT_STEP
from qlora_core.data.row import Message, Row
from qlora_core.data.tokenizer_proof import lost_characters, name_characters
from qlora_core.errors import MaskError

# A template that fails on more than this share of rows is at fault itself; on fewer, those rows are.
MAX_UNPROVEN_SHARE = 0.1
TEMPLATE_RULES = frozenset({"mask_unproven", "template_refused"})
# What is rendered, tokenized and decoded at once: some tens of megabytes, however long single rows are.
PORTION_CHARACTERS = 1_000_000
PORTION_ROWS = 256


@dataclass(frozen=True, slots=True)
class TrainedTurn:
    """An answer within the row's ids: tokens `start` to `stop` (the stop token's place, trained too)."""

    message_index: int
    prompt: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class MaskedRow:
    """A row in tokens. `loss_mask[i]` says whether `input_ids[i]` carries loss; the turns are in order.

    `rejected_ids` and `rejected_mask` are the same of the worse answer of a preference pair, see `preference_pairs`.
    """

    row: Row
    input_ids: list[int]
    loss_mask: list[bool]
    turns: tuple[TrainedTurn, ...]
    rejected_ids: list[int] | None = None
    rejected_mask: list[bool] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that is not used, by which rule, and what was wrong; the detail quotes no conversation.

    `lost` holds the characters that the tokenizer lost, each once, in the order of their code points.
    """

    row: Row
    rule: str
    detail: str
    lost: str = ""


@dataclass(frozen=True, slots=True)
class _Rendered:
    row: Row
    text: str
    prompts: dict[int, str]


def mask_rows(chat: ChatTokenizer, rows: Sequence[Row]) -> list[MaskedRow | Refusal]:
    """Each row with its proven mask, or why it has none; in the order given."""
    return list(stream_masked(chat, rows))


def stream_masked(chat: ChatTokenizer, rows: Sequence[Row]) -> Iterator[MaskedRow | Refusal]:
    """What `mask_rows` gives, one by one; no more than a portion of the rows is in memory at once."""
    for portion in _portions(rows):
        rendered = _render(chat, portion)
        placed = _place_all(chat, rendered)
        yield from _prove_texts(chat, rendered, placed)


def encode_proven(chat: ChatTokenizer, rows: Sequence[Row]) -> list[MaskedRow]:
    """The same rows, ids and masks as `mask_rows` gives for rows it has proven before, without decoding them.

    For rows whose proof by this very tokenizer and template is on record. Raises MaskError for a row whose mask
    cannot even be placed: then the record is not about this row.
    """
    masked: list[MaskedRow] = []
    for portion in _portions(rows):
        for outcome in _place_all(chat, _render(chat, portion)):
            if isinstance(outcome, Refusal):
                raise MaskError(
                    f"{outcome.row.source}, line {outcome.row.line} is on record as proven, but {outcome.detail}. The "
                    "tokenizer or the template is not the one of the record; curate again without the cached tags"
                )
            masked.append(outcome)
    return masked


def _portions(rows: Sequence[Row]) -> Iterator[list[Row]]:
    portion: list[Row] = []
    size = 0
    for row in rows:
        # A row is rendered once whole and once for each trained turn.
        cost = sum(len(message.content) for message in row.messages) * (1 + sum(m.train for m in row.messages))
        if portion and (size + cost > PORTION_CHARACTERS or len(portion) == PORTION_ROWS):
            yield portion
            portion, size = [], 0
        portion.append(row)
        size += cost
    if portion:
        yield portion


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


def _render(chat: ChatTokenizer, rows: Sequence[Row]) -> list[_Rendered | Refusal]:
    """Every row's text and prompts. Rows that cannot be rendered, or whose text shows a fault, are refused."""
    special = [next((hit for m in row.messages if (hit := chat.special_text.search(m.content))), None) for row in rows]
    clean = [row for row, found in zip(rows, special, strict=True) if not found]
    trained = [[index for index, message in enumerate(row.messages) if message.train] for row in clean]
    texts = chat.render_all([row.messages for row in clean])
    openings = [row.messages[:i] for row, turns in zip(clean, trained, strict=True) for i in turns]
    prompts = iter(chat.render_all(openings, add_generation_prompt=True))
    judged = iter(
        [
            _judge(chat, row, text, {index: next(prompts) for index in turns})
            for row, text, turns in zip(clean, texts, trained, strict=True)
        ]
    )
    return [
        Refusal(row, "special_token_text", f"a turn holds the special token {found[0]!r} as text")
        if found
        else next(judged)
        for row, found in zip(rows, special, strict=True)
    ]


def _judge(
    chat: ChatTokenizer, row: Row, text: str | MaskError, rendered: dict[int, str | MaskError]
) -> _Rendered | Refusal:
    prompts: dict[int, str] = {}
    for index, prompt in rendered.items():
        for one in (text, prompt):
            if isinstance(one, MaskError):
                return Refusal(row, "template_refused", f"the template refuses it: {one.__cause__ or one}")
        prompts[index] = str(prompt)
    for index, prompt in prompts.items():
        fault = _text_fault(chat, str(text), prompt, row.messages[index])
        if fault:
            return Refusal(row, "mask_unproven", f"turn {index + 1}: {fault}")
    return _Rendered(row, str(text), prompts)


def _text_fault(chat: ChatTokenizer, text: str, prompt: str, answer: Message) -> str | None:
    if not text.startswith(prompt):
        return "the rendered prompt does not open the rendered row"
    written = text[len(prompt) :].lstrip()
    if not written.startswith(answer.content):
        return "the assistant's text does not follow the generation prompt unchanged"
    if not written[len(answer.content) :].lstrip().startswith(chat.stop_token):
        return f"the stop token {chat.stop_token} does not follow the assistant's text"
    return None


def _place_all(chat: ChatTokenizer, rendered: Sequence[_Rendered | Refusal]) -> list[MaskedRow | Refusal]:
    good = [one for one in rendered if isinstance(one, _Rendered)]
    ids = iter(chat.encode([text for one in good for text in (one.text, *one.prompts.values())]))
    return [
        one if isinstance(one, Refusal) else _place(chat, one, next(ids), {index: next(ids) for index in one.prompts})
        for one in rendered
    ]


def _place(
    chat: ChatTokenizer, rendered: _Rendered, ids: list[int], prompt_ids: dict[int, list[int]]
) -> MaskedRow | Refusal:
    """Find every answer among the row's ids and check what ids alone can show."""
    row = rendered.row
    mask = [False] * len(ids)
    turns: list[TrainedTurn] = []
    for index, opening in prompt_ids.items():
        start = len(opening)
        turn = f"turn {index + 1}"
        if ids[:start] != opening:
            return Refusal(row, "mask_unproven", f"{turn}: the prompt's token ids do not open the row's ids")
        if turns and start <= turns[-1].stop:
            return Refusal(row, "mask_unproven", f"{turn}: the prompt does not hold the answer before it")
        try:
            stop = ids.index(chat.stop_token_id, start)
        except ValueError:
            return Refusal(row, "mask_unproven", f"{turn}: the stop token {chat.stop_token} is not among the ids")
        if stop == start:
            answer = row.messages[index].content
            lost = lost_characters(chat, answer, "")
            named = f", {name_characters(lost)}" if lost else ""
            return Refusal(row, "not_round_trip", f"{turn}: the tokenizer makes no token of the text{named}", lost)
        mask[start : stop + 1] = [True] * (stop + 1 - start)
        turns.append(TrainedTurn(index, rendered.prompts[index], start, stop))
    if fault := _bos_fault(chat, ids):
        return Refusal(row, "mask_unproven", fault)
    return MaskedRow(row, ids, mask, tuple(turns))


def _bos_fault(chat: ChatTokenizer, ids: list[int]) -> str | None:
    bos = chat.bos_token_id
    if bos is not None:
        extra = 0 if bos == chat.stop_token_id else ids.count(bos) - 1
        if ids[0] != bos or ids[1:2] == [bos] or extra:
            return f"the row must open with one BOS (id {bos}), and hold no other"
    # Some tokenizers open every turn with the token they name as BOS; two at the start are one too many for them too.
    elif chat.named_bos_id is not None and ids[:2] == [chat.named_bos_id] * 2:
        return f"the row opens with two BOS (id {chat.named_bos_id})"
    return None


def _prove_texts(
    chat: ChatTokenizer, rendered: Sequence[_Rendered | Refusal], placed: list[MaskedRow | Refusal]
) -> list[MaskedRow | Refusal]:
    """Decode what was placed and compare it with the text that was meant; every token is decoded once.

    A row is cut where its mask changes. The parts, decoded apart, must be the answers with their stop tokens and must
    make up the whole text. Where they are not, decoders that join words across a cut are given a second look.
    """
    cuts = [_cuts(masked) if isinstance(masked, MaskedRow) else [] for masked in placed]
    pieces = [
        masked.input_ids[start:end]
        for masked, bounds in zip(placed, cuts, strict=True)
        if isinstance(masked, MaskedRow)
        for start, end in pairwise(bounds)
    ]
    decoded = iter(chat.decode(pieces))
    proven: list[MaskedRow | Refusal] = []
    for one, masked, bounds in zip(rendered, placed, cuts, strict=True):
        if isinstance(masked, Refusal) or isinstance(one, Refusal):
            proven.append(masked)
            continue
        parts = {bound: next(decoded) for bound in pairwise(bounds)}
        proven.append(masked if _parts_fit(chat, one, masked, parts) else _second_look(chat, one, masked))
    return proven


def _cuts(masked: MaskedRow) -> list[int]:
    """0, the start and end of every trained turn, the row's length; each once, rising."""
    ends = {end for turn in masked.turns for end in (turn.start, turn.stop + 1)}
    return sorted({0, len(masked.input_ids), *ends})


def _parts_fit(chat: ChatTokenizer, one: _Rendered, masked: MaskedRow, parts: dict[tuple[int, int], str]) -> bool:
    for turn in masked.turns:
        if not _is_answer(chat, parts[turn.start, turn.stop + 1], one.row.messages[turn.message_index]):
            return False
    return _same_text("".join(parts.values()), one.text)


def _is_answer(chat: ChatTokenizer, trained: str, answer: Message) -> bool:
    """Templates and decoders may put blanks between the parts; the answer itself has none at its ends."""
    trained = trained.strip()
    return trained.endswith(chat.stop_token) and trained.removesuffix(chat.stop_token).strip() == answer.content


def _same_text(decoded: str, text: str) -> bool:
    """Decoders set blanks around special tokens; anything else that differs was lost by the tokenizer."""
    return decoded == text or "".join(decoded.split()) == "".join(text.split())


def _second_look(chat: ChatTokenizer, one: _Rendered, masked: MaskedRow) -> MaskedRow | Refusal:
    """The proof on whole prefixes: a trained turn is what its tokens add to the text of the tokens before them."""
    ends = [(turn.start, turn.stop + 1) for turn in masked.turns]
    decoded = chat.decode([masked.input_ids, *(masked.input_ids[:end] for pair in ends for end in pair)])
    whole, prefixes = decoded[0], iter(decoded[1:])
    lost = lost_characters(chat, one.text, whole)
    named = f"; it loses {name_characters(lost)}" if lost else ""
    for turn in masked.turns:
        before, through = next(prefixes), next(prefixes)
        trained = through[len(before) :] if through.startswith(before) else ""
        if not _is_answer(chat, trained, one.row.messages[turn.message_index]):
            detail = f"turn {turn.message_index + 1}: its trained tokens decode to another text{named}"
            return Refusal(one.row, "not_round_trip", detail, lost)
    if not _same_text(whole, one.text):
        return Refusal(one.row, "not_round_trip", f"the row's tokens decode to another text{named}", lost)
    return masked
