"""Alpaca-style records: an instruction, the text it is about, the answer; also as Dolly and GPTeacher spell it."""

from qlora_core.data.readers.format import (
    Fields,
    Format,
    first_present,
    read_optional_text,
    read_text,
    single_exchange,
)
from qlora_core.data.row import Draft, RowError
from qlora_core.data.text_form import join_input, strip_alpaca_wrapper

ANSWER_FIELDS = ("output", "response", "completion", "answer")


def _matches(fields: Fields) -> bool:
    return "instruction" in fields and first_present(fields, ANSWER_FIELDS) is not None


def _read(fields: Fields) -> Draft:
    answer_field = first_present(fields, ANSWER_FIELDS)
    if "instruction" not in fields or answer_field is None:
        raise RowError(f"missing field: an instruction and one of {', '.join(ANSWER_FIELDS)}; got {sorted(fields)}")
    instruction = strip_alpaca_wrapper(read_text(fields["instruction"], "instruction"))
    prompt = join_input(instruction, read_optional_text(fields, "input", "context"))
    return single_exchange(fields, prompt, read_text(fields[answer_field], answer_field))


FORMAT = Format("alpaca", "instruction, input or context, and output or response", _matches, _read)
