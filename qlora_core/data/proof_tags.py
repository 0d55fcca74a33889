"""Lengths and proofs as columns beside the rows: what curation must know of a row in tokens before it keeps it.

The tokens themselves are not kept: rows that stay are tokenized again, without another proof. Knows nothing of where
the columns are stored.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from qlora_core.data.chat_template import ChatTokenizer
from qlora_core.data.loss_mask import MAX_UNPROVEN_SHARE, TEMPLATE_RULES, MaskedRow, Refusal, stream_masked
from qlora_core.data.rendering import NEXT_STEP
from qlora_core.data.row import Row
from qlora_core.data.tokenizer_proof import MAX_LOSSY_SHARE, check_lossy_share
from qlora_core.data.window import fit
from qlora_core.errors import MaskError

OverLong = Literal["drop", "cut"]

# tokens: length after the template; of a row to be cut, its length after the cut; of one dropped as over_long, before.
# trained: how many of them carry loss. answer_start: how many stand before the first that does. All null in a refused
# row. rule: why the row cannot be kept, null if it can. detail: what was wrong, without a word of the conversation.
# lost: the characters that the tokenizer loses.
PROOF_SCHEMA = pa.schema(
    [
        pa.field("tokens", pa.int32()),
        pa.field("trained", pa.int32()),
        pa.field("answer_start", pa.int32()),
        pa.field("rule", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("lost", pa.string()),
    ]
)


def prove_rows(
    chat: ChatTokenizer, rows: Sequence[Row], limit: int | None = None, over_long: OverLong = "drop"
) -> pa.Table:
    """A row of PROOF_SCHEMA for every row, in order; no rows give an empty table.

    `rule` is special_token_text, template_refused, mask_unproven, not_round_trip or, with a `limit` in tokens,
    over_long. Without a limit no row is over_long and none is cut, so that the columns can be kept for any window
    (`is_over_long`).
    """
    columns: dict[str, list] = {name: [] for name in PROOF_SCHEMA.names}
    for outcome in stream_masked(chat, rows):
        for name, value in zip(PROOF_SCHEMA.names, _measure(outcome, limit, over_long), strict=True):
            columns[name].append(value)
    return pa.table(columns, schema=PROOF_SCHEMA)


def is_over_long(proofs: pa.Table, limit: int, over_long: OverLong) -> np.ndarray:
    """Bool (rows,): which proven rows a window of `limit` tokens drops; refused ones are False."""
    column = "tokens" if over_long == "drop" else "answer_start"
    least = limit + 1 if over_long == "drop" else limit
    tokens = proofs.column(column).combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False)
    return tokens >= least


def check_proofs(
    chat: ChatTokenizer,
    proofs: pa.Table,
    rows: Sequence[Row],
    max_unproven_share: float = MAX_UNPROVEN_SHARE,
    max_lossy_share: float = MAX_LOSSY_SHARE,
) -> None:
    """Raises MaskError where it is the template or the tokenizer, not the rows, that is at fault.

    `proofs` belongs to `rows`, row by row. The template may fail on up to `max_unproven_share` of them, the tokenizer
    may lose characters of up to `max_lossy_share` (both 0 to 1); the error names the first row or the characters.
    """
    rules = proofs.column("rule").combine_chunks().dictionary_encode()
    names = rules.dictionary.to_pylist()
    codes = rules.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    failed = np.flatnonzero(np.isin(codes, [code for code, name in enumerate(names) if name in TEMPLATE_RULES]))
    if len(failed) > max_unproven_share * len(proofs):
        first = int(failed[0])
        row, detail = rows[first], proofs.column("detail")[first].as_py()
        raise MaskError(
            f"the chat template ({chat.origin}) cannot be masked: it failed on {len(failed)} of {len(proofs)} rows, "
            f"first on {row.source}, line {row.line}: {detail}. {NEXT_STEP}"
        )
    lossy = proofs.column("lost").filter(
        pa.array([name == "not_round_trip" for name in names], pa.bool_()).take(rules.indices)
    )
    lost = Counter(character for characters in lossy.to_pylist() for character in characters or "")
    check_lossy_share(len(lossy), len(proofs), lost, max_lossy_share)


def _measure(outcome: MaskedRow | Refusal, limit: int | None, over_long: OverLong) -> tuple:
    if isinstance(outcome, Refusal):
        return None, None, None, outcome.rule, outcome.detail, outcome.lost or None
    fitted = outcome if limit is None else fit(outcome, limit, over_long)
    kept = fitted or outcome
    rule = None if fitted else "over_long"
    trained = sum(kept.loss_mask)
    return len(kept.input_ids), trained, outcome.turns[0].start, rule, None, None
