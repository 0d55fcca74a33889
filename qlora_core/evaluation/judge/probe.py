"""What an endpoint honours, found by asking: a JSON schema, log-probabilities. Pure: knows no transport or price.

Many servers accept `response_format` or `logprobs` and ignore them, so acceptance says nothing: the probe asks for one
thing in words and another by schema, and only a reply that obeys the schema shows that it is honoured.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from qlora_core.evaluation.judge.client import Failure, Reply

PROBE_VERSION = "probe-1"
TOKEN = "schema-is-honoured"
PROBE_MESSAGES = ({"role": "user", "content": "Say hello in one short sentence of plain text."},)


class Capabilities(NamedTuple):
    """What was shown to work; what was not shown counts as absent."""

    schema: bool
    log_probabilities: bool

    def as_text(self) -> str:
        """One line for records."""
        return f"probe: schema={self.schema} log_probabilities={self.log_probabilities}"


def capabilities_of(text: str | None) -> Capabilities | None:
    """What `as_text` wrote; None for any other text."""
    found = re.fullmatch(r"probe: schema=(True|False) log_probabilities=(True|False)", text or "")
    return None if found is None else Capabilities(found[1] == "True", found[2] == "True")


def json_schema(name: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    """`response_format` for an object of exactly these properties."""
    schema = {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}


def probe_parameters(refused: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Parameters of the probing call, without those the server refused by name."""
    wanted = {
        "response_format": json_schema("probe", {"probe": {"type": "string", "enum": [TOKEN]}}),
        "logprobs": True,
    }
    return {name: value for name, value in wanted.items() if name not in refused}


def refused_parameter(failure: Failure, asked: Mapping[str, Any]) -> str | None:
    """Which of the asked parameters a refusal names, or None."""
    if failure.reason != "rejected":
        return None
    return next((name for name in asked if name in failure.advice), None)


def read_capabilities(reply: Reply) -> Capabilities:
    """What a reply to the probe shows."""
    try:
        obeyed = json.loads(reply.content or "") == {"probe": TOKEN}
    except json.JSONDecodeError:
        obeyed = False
    return Capabilities(schema=obeyed, log_probabilities=reply.log_probabilities)
