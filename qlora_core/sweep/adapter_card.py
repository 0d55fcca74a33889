"""What goes beside the weights of a sweep's best adapter: where it comes from, and the tokenizer it learned with."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_core.errors import SweepError

LINEAGE = ("base_revision", "quantized_base_digest", "data_digest", "chat_template_origin")
"""What an adapter is bound to: it is meaningless over another base, and unproven on other data."""


def write_adapter_card(
    adapter: Path, lineage: Mapping[str, str], params: Mapping[str, Any], precision: str, tokenizer: Path
) -> None:
    """Write `qlora.json` and copy the tokenizer folder's files (chat template included) into the adapter's folder.

    What was trained on top of another adapter lies in the fused folder's `child`, and has the card, too, beside the
    parents that it already names.

    Raises SweepError when a part of the lineage is missing, or a tokenizer file would overwrite one of the adapter's.
    """
    missing = [name for name in LINEAGE if name not in lineage]
    if missing:
        raise SweepError(f"the adapter's lineage lacks {', '.join(missing)}; it has {', '.join(sorted(lineage))}")
    files = sorted(path for path in tokenizer.iterdir() if path.is_file())
    for path in files:
        if (adapter / path.name).exists():
            raise SweepError(f"{path} would overwrite {adapter / path.name}; rename the file in the tokenizer folder")
        shutil.copyfile(path, adapter / path.name)
    card = {name: lineage[name] for name in LINEAGE} | {"params": dict(params), "precision": precision}
    _write(adapter / "qlora.json", card)
    child = adapter / "child" / "qlora.json"
    if child.is_file():
        _write(child, card | json.loads(child.read_text()))


def _write(path: Path, card: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(card, indent=2, sort_keys=True, allow_nan=False) + "\n")
