"""Commands on the promotion gate: decide again from evidence, explain a decision, the history of champions."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.champions import NOT_PROMOTED
from flows.cli.reporting import JsonOption, Report, SetOption, reporting
from flows.cli.stages import ConfigArgument
from qlora_core.errors import ConfigError

if TYPE_CHECKING:
    from qlora_core.config.gate import GateConfig

_EXPLAIN = "explain"


def gate(
    evidence: Annotated[
        list[str],
        typer.Argument(
            metavar="[explain] EVIDENCE",
            help="evidence.json of a registration, here or from MLflow.",
            show_default=False,
        ),
    ],
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy", metavar="YAML", help="Decide under this policy, or a config's; default: the recorded."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Decide again from recorded evidence, without a model, a judge or the registry. Exit code 3: not PROMOTE.

    Both say how small a gain evidence like this could have shown; `qlora gate explain` lists every check with what it
    found, and the digests the evidence is bound to.

    Examples:

      qlora gate evidence.json

      qlora gate evidence.json --policy stricter.yaml

      qlora gate explain evidence.json
    """
    with reporting(json) as report:
        explained, path = _words(evidence)
        from qlora_core.registry.evidence import decide_again, read_evidence_file

        found = read_evidence_file(path)
        wanted = None if policy is None else _read_policy(policy)
        decision = decide_again(found, wanted)
        recorded = found.get("decision", {}).get("verdict")
        report.data = {
            "verdict": decision.verdict,
            "reasons": list(decision.reasons),
            "champion": (found["champion"] or {}).get("version"),
            "recorded_verdict": recorded,
        }
        report.say(f"verdict: {decision.verdict} (recorded: {recorded})")
        if explained:
            _explain(report, found, wanted)
        else:
            for reason in decision.reasons:
                report.say(f"  {reason}")
        report.data |= _detectable(found, wanted)
        report.exit_code = 0 if decision.verdict == "PROMOTE" else NOT_PROMOTED


def history(config: ConfigArgument, overrides: SetOption = None, json: JsonOption = False) -> None:
    """Every move of the champion alias, oldest first: when, from which version to which, and why.

    Example:

      qlora history pipeline.yaml
    """
    with reporting(json) as report:
        from qlora_core.config.load import load_config
        from qlora_core.registry.promotion import read_history

        loaded = load_config(config, overrides or ())
        found = read_history(loaded.tracking_uri, loaded.registry.model_name)
        report.data = found
        report.say(f"champion of {loaded.registry.model_name}: {found['champion'] or 'none'}")
        for move in found["moves"]:
            state = "" if move["state"] == "done" else f" [{move['state']}]"
            way = f"{move['action']} {move['previous'] or 'none'} -> {move['version']}{state}"
            by = f" by {move['by']}" if move["by"] else ""
            report.say(f"  {move['at']}  {way}{by}: {move['reason']}")


def _words(words: list[str]) -> tuple[bool, Path]:
    """Whether to explain, and the evidence's path."""
    explained = words[0] == _EXPLAIN and len(words) > 1
    rest = words[1:] if explained else words
    if len(rest) != 1:
        raise ConfigError(f"`qlora gate` takes one evidence file, not {len(rest)}: {' '.join(rest)}")
    return explained, Path(rest[0])


def _read_policy(path: Path) -> "GateConfig":
    from qlora_core.config.gate import GateConfig
    from qlora_core.config.load import parse_section
    from qlora_core.config.yaml_text import parse_document

    try:
        values, _ = parse_document(path.read_text(encoding="utf-8"), path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the policy {path}: {error}") from error
    section = values.get("gate", values) if isinstance(values, Mapping) else values
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path} holds no gate policy: give its settings, or a config with a `gate` section")
    return parse_section(GateConfig, dict(section), "gate")


def _explain(report: Report, evidence: Mapping[str, Any], policy: "GateConfig | None") -> None:
    from qlora_core.registry.evidence import policy_of
    from qlora_core.registry.gate.decide import check

    findings = check(evidence["evaluation"], evidence["champion"], policy or policy_of(evidence))
    report.data["checks"] = [
        {"check": found.check, "verdict": found.verdict, "sentence": found.sentence} for found in findings
    ]
    for name in dict.fromkeys(found.check for found in findings):
        report.say(f"  {name}")
        for found in findings:
            if found.check == name:
                report.say(f"    {found.verdict:<8}{found.sentence}")
    report.data["digests"] = evidence.get("digests")
    for part, digest in (evidence.get("digests") or {}).items():
        report.say(f"  {part:<11}{digest or 'none'}")
    report.say("  The gravest check decides: INVALID, REJECT, HOLD, then PROMOTE.")


def _detectable(evidence: Mapping[str, Any], policy: "GateConfig | None") -> dict[str, Any]:
    """How small a true gain evidence of this size and scatter shows in 8 of 10 tries, and in which metric."""
    from qlora_core.registry.evidence import policy_of
    from qlora_core.registry.gate.decide import minimum_detectable_gain

    used = policy or policy_of(evidence)
    least = minimum_detectable_gain(evidence["evaluation"], evidence["champion"], used)
    return {"detectable_gain": least, "primary_metric": used.primary.metric}
