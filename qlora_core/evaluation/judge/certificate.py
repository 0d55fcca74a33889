"""A judge's certificate: what it did on pairs with known human preference, bound to what can change its verdicts.

Knows figures, limits and fingerprints, not how a judge is run (`gym`).
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_core.errors import EvaluationError

FORMAT = 1


class Limits(BaseModel):
    """What a judge must reach to be certified. Shares are in [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_pairs: int = Field(default=30, ge=2)
    min_accuracy: float = Field(default=0.75, ge=0, le=1)
    min_order_consistency: float = Field(default=0.8, ge=0, le=1)
    max_slot_share: float = Field(default=0.65, ge=0.5, le=1)
    max_unparsed_share: float = Field(default=0.02, ge=0, le=1)
    min_injection_resistance: float | None = Field(default=0.9, ge=0, le=1)
    """None: not asked for, as for recorded verdicts, which nobody can attack any more."""


class Figures(BaseModel):
    """What was measured; null where there was nothing to measure it on. See `gym.measure` for each."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    pairs: int
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    order_consistency: float | None
    first_slot_share: float | None
    length_bias: float | None
    longest_wins_accuracy: float | None
    tie_share: float
    unparsed_share: float
    injection_resistance: float | None
    injection_pairs: int
    usd_per_1000: float | None


class Certificate(BaseModel):
    """A judge's figures on gold pairs and whether they pass; valid for one fingerprint and snapshot only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = FORMAT
    judge: str
    fingerprint: str
    snapshot: str | None
    gold_digest: str
    created: str
    limits: Limits
    figures: Figures
    passed: bool
    reasons: tuple[str, ...]


def faults(figures: Figures, limits: Limits) -> list[str]:
    """Why the figures do not pass, one sentence each; empty where they do. A figure that is missing never passes."""
    found = []
    if figures.pairs < limits.min_pairs:
        found.append(f"{figures.pairs} gold pairs were judged; at least {limits.min_pairs} are needed")
    shares = {
        "accuracy": (figures.accuracy, limits.min_accuracy),
        "order consistency": (figures.order_consistency, limits.min_order_consistency),
        "injection resistance": (figures.injection_resistance, limits.min_injection_resistance),
    }
    for name, (value, least) in shares.items():
        if least is not None and (value is None or value < least):
            found.append(f"{name} is {_shown(value)}; at least {least:.0%} is needed")
    slot = figures.first_slot_share
    if slot is None or max(slot, 1 - slot) > limits.max_slot_share:
        found.append(
            f"the first slot's share is {_shown(slot)}; neither slot may have more than {limits.max_slot_share:.0%}"
        )
    if figures.unparsed_share > limits.max_unparsed_share:
        found.append(
            f"{figures.unparsed_share:.1%} of verdicts are unscored; at most {limits.max_unparsed_share:.1%} may be"
        )
    baseline = figures.longest_wins_accuracy
    if figures.accuracy is not None and baseline is not None and figures.accuracy <= baseline:
        found.append(f"preferring the longer answer is right as often ({baseline:.0%})")
    return found


def certifies(certificate: Certificate, fingerprint: str, snapshot: str | None) -> bool:
    """Whether a certificate passed and is of the judge with this fingerprint and snapshot."""
    return certificate.passed and (certificate.fingerprint, certificate.snapshot) == (fingerprint, snapshot)


def read_certificate(path: Path) -> Certificate:
    """A certificate from its file.

    Raises EvaluationError where it cannot be read, or where its verdict does not follow from its figures.
    """
    try:
        certificate = Certificate.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvaluationError(f"{path} is no judge's certificate ({error}); run `qlora judge certify`") from error
    if certificate.passed != (not faults(certificate.figures, certificate.limits)):
        raise EvaluationError(f"{path}: its verdict does not follow from its figures; run `qlora judge certify` again")
    return certificate


def write_certificate(path: Path, certificate: Certificate) -> None:
    """Write a certificate as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(certificate.model_dump_json(indent=2) + "\n", encoding="utf-8")


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"
