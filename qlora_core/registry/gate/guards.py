"""The gate's guards: figures that may not break, whatever the primary metric gains.

Each is off until the policy sets it; one that is set and finds no figure makes the evidence unusable. Knows recorded
figures, not how they were measured.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_core.config.gate import GateConfig, GuardsConfig
from qlora_core.registry.gate.findings import Finding, UnusableEvidenceError, number, section
from qlora_core.registry.gate.primary import Comparison

_CHECK = "guards"


def guard_findings(evaluation: Mapping[str, Any], comparison: Comparison, policy: GateConfig) -> Iterator[Finding]:
    """One finding per guard that is set: PROMOTE where it holds, REJECT where it is broken.

    Raises UnusableEvidenceError where a figure is missing; the text names the setting of `evaluate` that records it.
    """
    guards = policy.guards
    yield from _text_guards(comparison, guards)
    yield from _speed_and_size(evaluation, comparison, guards)
    if guards.base_digest is not None:
        yield _base(evaluation, guards.base_digest)
    if guards.parity:
        yield _parity(evaluation)


def _text_guards(comparison: Comparison, guards: GuardsConfig) -> Iterator[Finding]:
    if guards.max_perplexity_increase is not None:
        yield _perplexity(comparison, guards.max_perplexity_increase)
    if guards.length_ratio is not None:
        yield _length(comparison, guards.length_ratio)
    if guards.max_refusal_increase is not None:
        before, after = _shares(comparison, "refusal")
        yield _judged(
            after - before,
            guards.max_refusal_increase,
            f"the share of refused prompts goes from {before:.3f} to {after:.3f}",
            "read the refused prompts in answers.jsonl",
        )
    if guards.max_degenerate_share is not None:
        _, after = _shares(comparison, "degenerate")
        yield _judged(
            after,
            guards.max_degenerate_share,
            f"{after:.3f} of the answers are empty, loop or repeat the question",
            "read them in answers.jsonl, and train for fewer steps or at a lower rate",
        )
    if guards.max_format_loss is not None:
        before, after = _shares(comparison, "format")
        yield _judged(
            before - after,
            guards.max_format_loss,
            f"the share of answers in their reference's form goes from {before:.3f} to {after:.3f}",
            "look at the training rows of that form",
        )


def _perplexity(comparison: Comparison, limit: float) -> Finding:
    general = _behaviour(comparison, "general", "evaluate.general_text")
    before, after = (number(general, key, f"{comparison.name}.general") for key in ("before_loss", "after_loss"))
    increase = math.expm1(after - before)
    figures = f"perplexity on general text changes by {increase:+.2%} (loss {before:.4f} to {after:.4f} nats per token)"
    return _judged(increase, limit, figures, "mix general rows into the data, or train at a lower rate")


def _length(comparison: Comparison, bounds: tuple[float, float]) -> Finding:
    before, after = (sum(_column(comparison, side, "words")) for side in ("before", "after"))
    if not before:
        raise UnusableEvidenceError(f"the answers of {comparison.rival} hold no word, so there is no length ratio")
    ratio, (low, high) = after / before, bounds
    figures = f"the answers have {ratio:.2f} times the words of {comparison.rival} ({after:.0f} to {before:.0f})"
    if low <= ratio <= high:
        return Finding("PROMOTE", f"A guard holds: {figures}; {low:g} to {high:g} is allowed.", _CHECK)
    remedy = "look at the lengths of the training answers"
    return Finding("REJECT", f"A guard is broken: {figures}; {low:g} to {high:g} is allowed; {remedy}.", _CHECK)


def _speed_and_size(evaluation: Mapping[str, Any], comparison: Comparison, guards: GuardsConfig) -> Iterator[Finding]:
    if guards.max_latency_ratio is not None:
        latency = _behaviour(comparison, "latency", "evaluate.latency_prompts")
        before, after = (number(latency, key, f"{comparison.name}.latency") for key in ("before_s", "after_s"))
        if before <= 0:
            raise UnusableEvidenceError(f"{comparison.name}.latency.before_s is {before:g}, not above 0")
        figures = f"a token takes {after / before:.2f} times as long ({before:.4f} to {after:.4f} s)"
        yield _judged(after / before, guards.max_latency_ratio, figures, "lower the rank or target fewer modules")
    if guards.max_adapter_bytes is not None:
        size = number(evaluation, "adapter_bytes", "evaluation")
        figures = f"the adapter's weights take {size:.0f} bytes"
        yield _judged(size, guards.max_adapter_bytes, figures, "lower the rank or target fewer modules")


def _base(evaluation: Mapping[str, Any], served: str) -> Finding:
    found = evaluation.get("quantized_base_digest")
    if not isinstance(found, str):
        raise UnusableEvidenceError("evaluation.quantized_base_digest is not recorded; evaluate in a pipeline's run")
    if found != served:
        raise UnusableEvidenceError(
            f"the adapter was evaluated over base {found[:12]}, and gate.guards.base_digest names {served[:12]}; train "
            "and evaluate over that base, or change the guard"
        )
    return Finding("PROMOTE", f"A guard holds: the base is the one served ({served[:12]}).", _CHECK)


def _parity(evaluation: Mapping[str, Any]) -> Finding:
    certificate = evaluation.get("parity")
    if not isinstance(certificate, Mapping):
        raise UnusableEvidenceError(
            "there is no parity certificate; merge with `qlora merge` and name it in evaluate.parity_certificate"
        )
    wanted, found = evaluation.get("adapter_weights_digest"), certificate.get("adapter_digest")
    if wanted is None or wanted != found:
        raise UnusableEvidenceError(
            f"the parity certificate is of adapter {found!r}, not of {wanted!r}; merge this one"
        )
    figures = f"the merged model ({certificate.get('target')}) was measured against the adapter"
    if certificate.get("verdict") != "pass":
        return Finding("REJECT", f"A guard is broken: {figures}, and fails; merge to 16bit or serve as it is.", _CHECK)
    return Finding("PROMOTE", f"A guard holds: {figures}, and passes.", _CHECK)


def _judged(value: float, limit: float, figures: str, remedy: str) -> Finding:
    if value <= limit:
        return Finding("PROMOTE", f"A guard holds: {figures}; at most {limit:g} is allowed.", _CHECK)
    return Finding("REJECT", f"A guard is broken: {figures}; at most {limit:g} is allowed; {remedy}.", _CHECK)


def _behaviour(comparison: Comparison, key: str, setting: str) -> Mapping[str, Any]:
    if not isinstance(comparison.behaviour.get(key), Mapping):
        raise UnusableEvidenceError(
            f"a guard asks for {key} figures against {comparison.rival}, and there are none; set {setting} and "
            "evaluate again"
        )
    return section(comparison.behaviour, key, comparison.name)


def _shares(comparison: Comparison, what: str) -> tuple[float, float]:
    """The shares of answers for which `what` holds, of the rival and of the challenger; null ones are not counted."""
    before, after = (_column(comparison, side, what) for side in ("before", "after"))
    return sum(before) / len(before), sum(after) / len(after)


def _column(comparison: Comparison, side: str, what: str) -> Sequence[float]:
    """The numbers recorded of the answers of one side. Raises UnusableEvidenceError where there is none."""
    try:
        column = [value for value in (comparison.items or {})["prompts"][side][what] if value is not None]
        found = [float(value) for value in column]
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableEvidenceError(
            f"a guard asks for the {what} of answers, and the evidence against {comparison.rival} has no such column; "
            "evaluate again to record it"
        ) from error
    if not found or not all(math.isfinite(value) for value in found):
        raise UnusableEvidenceError(
            f"a guard asks for the {what} of answers, and the evidence against {comparison.rival} has none to measure "
            "(evaluate.max_prompts)"
        )
    return found
