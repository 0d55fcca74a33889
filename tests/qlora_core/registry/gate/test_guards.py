"""Each guard: off by default, holding, broken, and without its figure, which is never passed."""

import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.gate import GateConfig
from qlora_core.registry.gate.decide import check, decide

sys.path.insert(0, str(Path(__file__).parent))
from gate_evidence import answers, evaluation, prompts_table, scattered

BASE = "b" * 64
ADAPTER = "a" * 64


def share(count: int, of: int) -> list[bool]:
    return [i < count for i in range(of)]


def found(**changes: Any) -> dict[str, Any]:
    """A clearly better challenger whose guards' figures are all recorded and sound, with those given in their place."""
    behaviour = {
        "general": {"tokens": 500, "before_loss": 2.0, "after_loss": 2.01},
        "latency": {"prompts": 5, "before_s": 0.1, "after_s": 0.11},
    }
    table = changes.pop("prompts", None) or prompts_table(
        60,
        before=answers(60, format=share(40, 60)),
        after=answers(60, words=[18] * 60, format=share(39, 60)),
    )
    facts: dict[str, Any] = {
        "behaviour": behaviour | changes.pop("behaviour", {}),
        "adapter_bytes": 1000,
        "adapter_weights_digest": ADAPTER,
        "parity": {"adapter_digest": ADAPTER, "target": "nf4", "verdict": "pass"},
        "quantized_base_digest": BASE,
    }
    return evaluation(scattered(0.4, 0.1, 60), prompts=table, **(facts | changes))


def after(**columns: Any) -> dict[str, Any]:
    return prompts_table(60, before=answers(60), after=answers(60, **columns))


GUARDS: dict[str, Any] = {
    "max_perplexity_increase": 0.02,
    "length_ratio": [0.6, 1.6],
    "max_refusal_increase": 0.01,
    "max_degenerate_share": 0.02,
    "max_format_loss": 0.05,
    "max_latency_ratio": 1.2,
    "max_adapter_bytes": 2000,
    "base_digest": BASE,
    "parity": True,
}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "max_perplexity_increase": ({"behaviour": {"general": {"before_loss": 2.0, "after_loss": 2.1}}}, "+10.52%"),
    "length_ratio": ({"prompts": after(words=[40] * 60)}, "2.00 times the words"),
    "max_refusal_increase": ({"prompts": after(refusal=share(3, 60))}, "from 0.000 to 0.050"),
    "max_degenerate_share": ({"prompts": after(degenerate=share(6, 60))}, "0.100 of the answers"),
    "max_format_loss": (
        {
            "prompts": prompts_table(
                60, before=answers(60, format=share(60, 60)), after=answers(60, format=[False] * 60)
            )
        },
        "from 1.000 to 0.000",
    ),
    "max_latency_ratio": ({"behaviour": {"latency": {"before_s": 0.1, "after_s": 0.2}}}, "2.00 times as long"),
    "max_adapter_bytes": ({"adapter_bytes": 3000}, "3000 bytes"),
    "parity": ({"parity": {"adapter_digest": ADAPTER, "target": "nf4", "verdict": "fail"}}, "fails"),
}
MISSING: dict[str, dict[str, Any]] = {
    "max_perplexity_increase": {"behaviour": {"general": None}},
    "length_ratio": {"prompts": prompts_table(0)},
    "max_refusal_increase": {"prompts": prompts_table(0)},
    "max_degenerate_share": {"prompts": prompts_table(0)},
    "max_format_loss": {"prompts": prompts_table(60)},  # no reference has a form
    "max_latency_ratio": {"behaviour": {"latency": None}},
    "max_adapter_bytes": {"adapter_bytes": None},
    "base_digest": {"quantized_base_digest": None},
    "parity": {"parity": None},
}


def test_every_guard_is_covered_here() -> None:
    assert set(GUARDS) == set(MISSING) == set(type(GateConfig().guards).model_fields)
    assert set(BROKEN) | {"base_digest"} == set(GUARDS)


def test_all_guards_hold_together() -> None:
    findings = [one for one in check(found(), None, GateConfig(guards=GUARDS)) if one.check == "guards"]  # type: ignore[arg-type]
    assert [one.verdict for one in findings] == ["PROMOTE"] * len(GUARDS)
    assert decide(found(), None, GateConfig(guards=GUARDS)).verdict == "PROMOTE"  # type: ignore[arg-type]


@pytest.mark.parametrize("guard", BROKEN)
def test_a_broken_guard_rejects_with_its_figures_and_is_off_by_default(guard: str) -> None:
    changes, said = BROKEN[guard]
    evidence = found(**changes)
    assert decide(evidence, None, GateConfig()).verdict == "PROMOTE"
    decision = decide(evidence, None, GateConfig.model_validate({"guards": {guard: GUARDS[guard]}}))
    assert decision.verdict == "REJECT"
    assert any("A guard is broken" in reason and said in reason for reason in decision.reasons)


@pytest.mark.parametrize("guard", MISSING)
def test_a_guard_without_its_figure_is_invalid_never_passed(guard: str) -> None:
    evidence = found(**MISSING[guard])
    assert decide(evidence, None, GateConfig()).verdict == "PROMOTE"
    rules = GateConfig.model_validate({"guards": {guard: GUARDS[guard]}})
    assert decide(evidence, None, rules).verdict == "INVALID"
    assert decide({key: value for key, value in evidence.items() if key == "metrics"}, None, rules).verdict == "INVALID"


def test_another_base_or_another_adapters_certificate_is_invalid() -> None:
    other = found(quantized_base_digest="c" * 64)
    assert decide(other, None, GateConfig.model_validate({"guards": {"base_digest": BASE}})).verdict == "INVALID"
    other = found(adapter_weights_digest="c" * 64)
    assert decide(other, None, GateConfig.model_validate({"guards": {"parity": True}})).verdict == "INVALID"


def test_guards_are_held_against_the_champion_where_there_is_one() -> None:
    evidence = found()
    champion = {
        "version": "3",
        "heldout": evidence["metrics"]["heldout"],
        "exact_match": None,
        "items": {"prompts": prompts_table(60, before=answers(60, words=[5] * 60))},
        "behaviour": None,
    }
    decision = decide(evidence, champion, GateConfig.model_validate({"guards": {"length_ratio": [0.6, 1.6]}}))
    assert decision.verdict == "REJECT"
    assert any("4.00 times the words of champion version 3" in reason for reason in decision.reasons)
    rules = GateConfig.model_validate({"guards": {"max_perplexity_increase": 0.02}})
    assert (
        decide(evidence, champion, rules).verdict == "INVALID"
    )  # the base's figures do not stand in for the champion's
