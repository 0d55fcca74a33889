"""When so many verdicts are lost to faults that may pass that they are no result. Knows verdict rows alone."""

from collections.abc import Sequence

from qlora_core.errors import JudgeUnavailableError
from qlora_core.evaluation.verdict import Verdict

PASSING_REASONS = ("rate_limit", "timeout", "server_error", "connection", "quota", "unauthorized", "stopped")
MAX_LOST_SHARE = 0.1
"""A few lost verdicts are counted and told; more are an outage."""


def check_outage(verdicts: Sequence[Verdict]) -> None:
    """Refuse verdicts of which an outage has taken too many: kept as a result, they would never be asked for again."""
    lost = [row.reason for row in verdicts if row.verdict is None and (row.reason or "").startswith(PASSING_REASONS)]
    if len(lost) > MAX_LOST_SHARE * len(verdicts):
        raise JudgeUnavailableError(
            f"the judge left {len(lost)} of {len(verdicts)} verdicts unscored for faults that may pass "
            f"({', '.join(sorted(set(filter(None, lost))))}); its verdicts so far are kept: run the command again, "
            "or set evaluate.judge.kind: offline"
        )
