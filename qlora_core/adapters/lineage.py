"""What an adapter descends from: the base it was trained on, and the adapters that were under it while it was trained.

Knows digests and `qlora.json`; computes nothing with weights.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from qlora_core.adapters.adapter_folder import AdapterFolder, adapter_digest, read_provenance
from qlora_core.errors import ModelError
from qlora_core.model.adapter import PARENTS_KEY, PROVENANCE_FILE


def record_parents(folder: Path, parents: Sequence[Path]) -> None:
    """Write into an adapter's `qlora.json` that it was trained on top of `parents`, in this order, all at weight 1.

    From then on it is refused without them (`attach_adapter`, `qlora compose`); `attach_stack` loads them together.
    """
    content = read_provenance(folder) | {PARENTS_KEY: [adapter_digest(parent) for parent in parents]}
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    (folder / PROVENANCE_FILE).write_text(text + "\n", encoding="utf-8")


def check_parents_present(adapters: Sequence[AdapterFolder]) -> None:
    """Refuse adapters whose parents do not stand before them in the list, in order.

    Raises:
        ModelError: naming the adapter and the missing digest.
    """
    for place, adapter in enumerate(adapters):
        before = [each.digest for each in adapters[:place]]
        wanted = adapter.provenance.get(PARENTS_KEY) or []
        lacking = [digest for digest in wanted if digest not in before]
        if lacking:
            raise ModelError(
                f"{adapter.path} was trained on top of adapter {lacking[0][:16]}..., which does not stand before it; "
                "name that adapter first: without it this one computes something nobody trained"
            )


def check_chain(adapters: Sequence[AdapterFolder]) -> None:
    """Refuse a sequence whose adapters were not each trained on exactly those before them.

    Raises:
        ModelError: naming the first that was not.
    """
    for place, adapter in enumerate(adapters):
        before = [each.digest for each in adapters[:place]]
        wanted = adapter.provenance.get(PARENTS_KEY) or []
        if wanted != before:
            raise ModelError(
                f"{adapter.path} records {len(wanted)} parents, and {len(before)} stand before it that are not the "
                "same; a sequence holds each adapter with exactly what it was trained on (method weighted adds others)"
            )


def common_base(adapters: Sequence[AdapterFolder]) -> dict[str, str | None]:
    """`quantized_base_digest` and `base_revision` that all adapters with provenance agree on; None where none says.

    Raises:
        ModelError: two name different bases: by digest or, where they have none, by the name in PEFT's settings.
    """
    found = {key: _agreed(adapters, key) for key in ("quantized_base_digest", "base_revision")}
    if found["quantized_base_digest"] is None:
        names = [(adapter, Path(adapter.config.base_model_name_or_path or "").name) for adapter in adapters]
        _agreed_value(names, "base_model_name_or_path")
    return found


def _agreed(adapters: Sequence[AdapterFolder], key: str) -> str | None:
    return _agreed_value([(adapter, adapter.provenance.get(key)) for adapter in adapters], key)


def _agreed_value(found: Sequence[tuple[AdapterFolder, str | None]], key: str) -> str | None:
    said = [(adapter, value) for adapter, value in found if value]
    for adapter, value in said[1:]:
        if value != said[0][1]:
            raise ModelError(
                f"{said[0][0].path} and {adapter.path} are of different bases ({key} {said[0][1]} and {value}); deltas "
                "on different bases have no sum"
            )
    return said[0][1] if said else None
