"""The digests an evidence pack names its parts by, and the check that the parts still have them.

Knows the pack's shape, not where it is kept. The digest over the whole finds any edit; these say what was edited, and
bind the pack to files that are not in it.
"""

import importlib.metadata
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qlora_core.digest import digest_files, digest_json
from qlora_core.store.manifest import DISTRIBUTION

JUDGE_IDENTITY = ("kind", "model", "fingerprint", "snapshot", "certificate")


def part_digests(pack: Mapping[str, Any]) -> dict[str, str | None]:
    """The digests of what the pack holds: policy, evaluation, champion, items, judge and decision. Null: has no such
    part.

    `items` covers the per-item tables against the base and the champion; `judge` what can change a verdict.
    """
    evaluation, champion = pack.get("evaluation"), pack.get("champion")
    judge = _inside(_inside(evaluation, "metrics"), "judge")
    items = {"base": _inside(evaluation, "items"), "champion": _inside(champion, "items")}
    return {
        "policy": digest_json(pack.get("policy")),
        "evaluation": digest_json(evaluation),
        "champion": None if champion is None else digest_json(champion),
        "items": digest_json(items) if any(items.values()) else None,
        "judge": None if judge is None else digest_json({key: _inside(judge, key) for key in JUDGE_IDENTITY}),
        "decision": digest_json(pack.get("decision")),
    }


def changed_parts(pack: Mapping[str, Any]) -> list[str]:
    """The parts whose digest is not the one the pack names, in order; none of a sound pack."""
    return [part for part, digest in part_digests(pack).items() if _inside(pack.get("digests"), part) != digest]


def _inside(value: Any, key: str) -> Any:
    """What stands under `key`; None in what is no object: an edit may have made anything of a part."""
    return value.get(key) if isinstance(value, Mapping) else None


@cache
def code_version() -> dict[str, str]:
    """The installed version, and a digest over the library's source files: the code that measured and decided."""
    root = Path(__file__).parents[1]
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return {"version": importlib.metadata.version(DISTRIBUTION), "source_sha256": digest_files(files)}
