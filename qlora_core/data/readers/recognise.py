"""Which format a file is in, by the fields of its first records; its name is never looked at."""

from collections import Counter
from collections.abc import Mapping, Sequence

from qlora_core.config.curation import ReadersConfig
from qlora_core.data.containers.record import Record
from qlora_core.data.readers import alpaca, messages, oasst, preference, prompt_response, self_instruct, sharegpt
from qlora_core.data.readers.format import Format
from qlora_core.errors import DataError

SAMPLE_RECORDS = 200


def known_formats(readers: ReadersConfig) -> Sequence[Format]:
    """Every format, as the config wants it read."""
    return (
        alpaca.FORMAT,
        messages.FORMAT,
        oasst.oasst_format(readers.oasst),
        preference.FORMAT,
        prompt_response.FORMAT,
        self_instruct.FORMAT,
        sharegpt.FORMAT,
    )


def recognise(file_name: str, records: Sequence[Record], formats: Sequence[Format]) -> Format:
    """The format that most of the first `SAMPLE_RECORDS` records match.

    Raises DataError if none matches any format, or if two formats match equally many; it names the file, the fields
    seen, and the formats known or tied.
    """
    sample = [record.value for record in records[:SAMPLE_RECORDS] if isinstance(record.value, Mapping)]
    claims = Counter(form.name for fields in sample for form in formats if form.matches(fields))
    ranked = claims.most_common()
    if not ranked:
        raise DataError(
            f"dataset file {file_name} is in no known format: {_fields_seen(sample)}. "
            f"Known formats: {_known(formats)}. Convert the file to one of them, or take it out of data.sources"
        )
    best = [name for name, count in ranked if count == ranked[0][1]]
    if len(best) > 1:
        raise DataError(
            f"dataset file {file_name} fits {' and '.join(sorted(best))} equally well: {_fields_seen(sample)}. "
            f"Remove the fields that are not meant, or split the file. Known formats: {_known(formats)}"
        )
    return next(form for form in formats if form.name == best[0])


def _fields_seen(sample: Sequence[Mapping[str, object]]) -> str:
    if not sample:
        return "its records are no objects"
    return f"its fields are {sorted({str(name) for fields in sample for name in fields})}"


def _known(formats: Sequence[Format]) -> str:
    return "; ".join(f"{form.name} ({form.shape})" for form in formats)
