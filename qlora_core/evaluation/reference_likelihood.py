"""Which of two models finds the reference answers likelier, as verdict rows.

Good for: whether a model learned the data and its format. Not for: the quality of what it writes; a model can find good
answers likely and write bad ones. Nothing is shown to anyone, so there is one row per prompt and no order effect. Never
certified.
"""

from collections.abc import Sequence

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.heldout import RowLoss
from qlora_core.evaluation.verdict import Verdict

JUDGE = "offline:reference-likelihood"


def reference_verdicts(
    losses_a: Sequence[RowLoss], losses_b: Sequence[RowLoss], *, model_a: str, model_b: str, tie_nats: float = 1e-3
) -> list[Verdict]:
    """One verdict per row: the model with the lower loss per token; a tie where they differ by at most `tie_nats`.

    Rows without trained tokens are unscored. Raises EvaluationError where the two are not of the same rows in order.
    """
    if [(row.id, row.tokens) for row in losses_a] != [(row.id, row.tokens) for row in losses_b]:
        raise EvaluationError(
            f"{len(losses_a)} and {len(losses_b)} losses are not of the same rows in one order; score both on one list"
        )
    verdicts = []
    for a, b in zip(losses_a, losses_b, strict=True):
        gain = (b.nats - a.nats) / a.tokens if a.tokens else None
        decided = None if gain is None else "tie" if abs(gain) <= tie_nats else "a" if gain > 0 else "b"
        verdicts.append(
            Verdict(
                prompt_id=a.id,
                model_a=model_a,
                model_b=model_b,
                verdict=decided,
                first="a",
                judge=JUDGE,
                reason="no_tokens: the row has no reference token" if decided is None else None,
            )
        )
    return verdicts
