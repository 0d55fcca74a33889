"""Records with one prompt and one answer under any of the usual pairs of names, FLAN's and TruthfulQA's among them.

Alpaca's fixed wrapper is taken off.
"""

from qlora_core.data.readers.format import Fields, Format, make_draft, read_text, single_exchange
from qlora_core.data.readers.messages import read_turns
from qlora_core.data.row import Draft, RowError
from qlora_core.data.text_form import strip_alpaca_wrapper

# In order of precedence, for a record that happens to hold two pairs.
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("prompt", "answer"),
    ("input", "output"),
    ("inputs", "targets"),
    ("question", "best_answer"),
)


def _pair(fields: Fields) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if pair[0] in fields and pair[1] in fields), None)


def _matches(fields: Fields) -> bool:
    return _pair(fields) is not None and "instruction" not in fields


def _read(fields: Fields) -> Draft:
    pair = _pair(fields)
    if pair is None:
        raise RowError(f"missing field: a pair such as prompt and response; got {sorted(fields)}")
    prompt, answer = fields[pair[0]], fields[pair[1]]
    if isinstance(prompt, list) and isinstance(answer, list):
        return make_draft(fields, [*read_turns(prompt), *read_turns(answer)])
    question = strip_alpaca_wrapper(read_text(prompt, pair[0])).strip()
    return single_exchange(fields, question, read_text(answer, pair[1]))


FORMAT = Format(
    "prompt/response",
    "prompt and response or completion, question and answer, input and output, inputs and targets",
    _matches,
    _read,
)
