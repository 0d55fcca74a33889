"""Self-Instruct seed tasks: one instruction with several instances of input and output; each instance is a row."""

from collections.abc import Mapping, Sequence

from qlora_core.data.readers.format import Fields, Format, read_optional_text, read_text, single_exchange
from qlora_core.data.row import Draft, RowError
from qlora_core.data.text_form import join_input


def _matches(fields: Fields) -> bool:
    return "instruction" in fields and isinstance(fields.get("instances"), list)


def _parts(fields: Fields) -> Sequence[Fields]:
    instances = fields.get("instances")
    if not isinstance(instances, list) or not instances:
        return [fields]
    shared = {name: value for name, value in fields.items() if name != "instances"}
    return [{**shared, "instance": instance} for instance in instances]


def _read(fields: Fields) -> Draft:
    instance = fields.get("instance")
    if "instruction" not in fields or not isinstance(instance, Mapping) or "output" not in instance:
        raise RowError(f"missing field: an instruction and instances with an output; got {sorted(fields)}")
    instruction = read_text(fields["instruction"], "instruction")
    prompt = join_input(instruction, read_optional_text(instance, "input"))
    return single_exchange(fields, prompt, read_text(instance["output"], "output"))


FORMAT = Format("self-instruct", "instruction and instances: a list of {input, output}", _matches, _read, _parts)
