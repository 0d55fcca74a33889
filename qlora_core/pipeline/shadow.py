"""One round of a shadow period: champion and candidate answer what users asked since the last round, over one base.

The pairs of all rounds are kept in the store, under a reference, so that any machine makes the next round. What they
mean is `evaluation.shadow`'s business, what follows from it `registry.shadow`'s.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.digest import digest_json
from qlora_core.errors import DataError, RegistryError
from qlora_core.evaluation.shadow import ShadowPair, shadow_figures
from qlora_core.pipeline.champion_lease import champion_lease
from qlora_core.pipeline.job import Job
from qlora_core.registry.model_address import SCHEME, resolve_address
from qlora_core.registry.shadow import Shadow, end, running_shadow
from qlora_core.registry.versions import RUN_KEY_TAG, RegisteredVersion
from qlora_core.store.artifact import Artifact, StageKey
from qlora_core.store.refs import read_ref, set_ref
from qlora_core.store.store import Store

_KIND = "shadow"
_FILE = "pairs.jsonl"
MOST_PROMPTS = 200
"""Answered in one round, so that rounds are short; the next one goes on."""


def shadow_round(config: PipelineConfig) -> dict[str, Any]:
    """Answer, judge by the rules of `gate.shadow`, and demote or promote if it is time.

    Keys: `version` (None: no candidate is in a shadow period, and nothing was done), `state` (running, or what became
    of it: passed, demoted), `answered` (in this round), `figures` (see `shadow_figures`), `outcome` (as `promote`
    returns it, None while it runs). Raises DataError for prompts that cannot be read.
    """
    where = (config.tracking_uri, config.registry.model_name)
    found = running_shadow(*where)
    if found is None:
        return {"version": None, "state": None, "answered": 0, "figures": None, "outcome": None}
    version, shadow = found
    store = Job(config).store
    known = _kept_pairs(store, version)
    asked = {pair.prompt for pair in known}
    fresh = [prompt for prompt in _prompts(config) if prompt not in asked][:MOST_PROMPTS]
    pairs = known + (_answer(config, store, version, fresh) if fresh else [])
    if fresh:
        _keep(store, version, pairs)
    figures = shadow_figures(pairs, config.gate.shadow)
    said = {"version": version.version, "answered": len(fresh), "figures": figures}
    broken = _reasons(config, shadow, figures)
    if not broken and not shadow.over:
        return {**said, "state": "running", "outcome": None}
    with champion_lease(config):
        outcome = end(*where, version.version, broken=broken)
    return {**said, "state": "demoted" if outcome["verdict"] == "REJECT" else "passed", "outcome": outcome}


def _reasons(config: PipelineConfig, shadow: Shadow, figures: dict[str, Any]) -> list[str]:
    """Why the candidate goes back: rules that are broken, or too little to tell when its time is over."""
    least = config.gate.shadow.min_prompts
    if not figures["broken"] and shadow.over and figures["prompts"] < least:
        return [f"{figures['prompts']} prompts were answered by {shadow.until}, and gate.shadow.min_prompts is {least}"]
    return list(figures["broken"])


def _prompts(config: PipelineConfig) -> list[str]:
    """The prompts of the file, each once, in its order."""
    named = config.gate.shadow.prompts
    if named is None:
        raise DataError("gate.shadow.prompts is not set, and a candidate is in its shadow period; name the file")
    path = config.path(named)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        prompts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'gate.shadow.prompts: {path} cannot be read ({error!r}); give JSON Lines, each {{"prompt": "..."}}'
        ) from error
    if not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise DataError(f"gate.shadow.prompts: {path} has a prompt that is no text, or empty; correct that line")
    return list(dict.fromkeys(prompts))


def _answer(
    config: PipelineConfig, store: Store, version: RegisteredVersion, prompts: Sequence[str]
) -> list[ShadowPair]:
    from qlora_core.data.dataset import PromptRow
    from qlora_core.data.row import Message
    from qlora_core.evaluation.adapter_scores import open_scorer
    from qlora_core.model.adapter_set import NamedAdapter

    quantized, curated = (_made_from(store, version, stage) for stage in ("quantize", "curate"))
    sides = ("champion", "candidate")
    folders = [
        resolve_address(config.tracking_uri, f"{SCHEME}{version.name}@{side}", config.work_dir / "champions")
        for side in sides
    ]
    for side, found in zip(sides, folders, strict=True):
        if found.quantized_base_digest != quantized.digest:
            raise RegistryError(
                f"the {side}, version {found.version}, was trained over another quantized base than version "
                f"{version.version}: the two cannot answer side by side; set gate.shadow.period_s to 0 for this change"
            )
    named = [NamedAdapter(side, found.folder) for side, found in zip(sides, folders, strict=True)]
    compute = config.compute.residency_settings
    with open_scorer(config.evaluate, quantized.path, named, curated.path, config.train.precision, compute) as scorer:
        rows = [
            PromptRow(
                str(number), None, scorer.chat.render([Message("user", prompt)], add_generation_prompt=True), "", []
            )
            for number, prompt in enumerate(prompts)
        ]
        champion, candidate = scorer.answers(rows, sides)
    return [ShadowPair(*pair) for pair in zip(prompts, champion, candidate, strict=True)]


def _made_from(store: Store, version: RegisteredVersion, stage: str) -> Artifact:
    """The artifact of a stage that the version was made from, which its reference keeps."""
    ref = read_ref(store.backend, "model", f"{version.name}/{version.tag(RUN_KEY_TAG)}")
    for address in ref.addresses if ref is not None else ():
        artifact = store.get_at(address) if address.split("/")[2] == stage else None
        if artifact is not None:
            return artifact
    raise RegistryError(
        f"{store.location} does not hold the {stage} artifact of version {version.version}; run the pipeline again"
    )


def _kept_pairs(store: Store, version: RegisteredVersion) -> list[ShadowPair]:
    ref = read_ref(store.backend, _KIND, f"{version.name}/{version.version}")
    for address in ref.addresses if ref is not None else ():
        artifact = store.get_at(address)
        if artifact is not None:
            lines = (artifact.path / _FILE).read_text(encoding="utf-8").split("\n")
            return [ShadowPair(**json.loads(line)) for line in lines if line]
    return []


def _keep(store: Store, version: RegisteredVersion, pairs: Sequence[ShadowPair]) -> None:
    rows = [pair._asdict() for pair in pairs]

    def build(out: Path) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / _FILE).write_text(text, encoding="utf-8", newline="\n")

    artifact, _ = store.get_or_build(StageKey(_KIND, "1", {}, {"pairs": digest_json(rows)}), build)
    note = f"{len(rows)} prompts answered beside the champion"
    set_ref(store.backend, _KIND, f"{version.name}/{version.version}", [artifact.manifest.address], note)
