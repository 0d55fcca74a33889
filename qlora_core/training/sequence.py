"""An adapter that was trained on top of another, written so that both can be used: fused with its parent, and alone.

The fused folder is an adapter of the base like any other; `child/` in it is what was trained, which is refused without
its parent. Knows folders and what the trained stack answered; knows no trials.
"""

import json
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from qlora_core.adapters.compose import compose
from qlora_core.adapters.lineage import record_parents
from qlora_core.quantization.checkpoint import TOKENIZER_FILES
from qlora_core.training.export import TrainedAdapter, prove_folder, write_adapter
from qlora_core.training.frozen_parent import FrozenParent

CHILD = "child"
"""In a fused adapter's folder: the folder of what was trained on top of the parent."""


def write_sequence(base: PreTrainedModel, parent: FrozenParent, trained: TrainedAdapter, out: Path) -> None:
    """Write what was trained over `parent` to `out`: parent and child fused, and the child in `out`/child.

    The fused adapter is loaded with stock PEFT over the base without the parent, and has to answer what the trained
    stack answered; those are its golden logits. `recipe.json` names both by digest.

    Raises:
        TrainingError: `out` holds something, or logits differ. ModelError: what `qlora compose` refuses.
    """
    stage = out.with_name(f".{out.name}.sequence")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        write_adapter(base, trained, stage / CHILD)
        record_parents(stage / CHILD, [parent.folder])
        recipe = {"method": "sequential", "adapters": [_named("parent", parent.folder), _named(CHILD, stage / CHILD)]}
        (stage / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
        compose(stage / "recipe.json", stage / "fused")
        for name in TOKENIZER_FILES:  # the parent's; whoever trains puts its own beside the adapter
            (stage / "fused" / name).unlink(missing_ok=True)
        with parent.taken_off():
            prove_folder(base, trained, stage / "fused")
        (stage / CHILD).replace(stage / "fused" / CHILD)
        if out.exists():
            out.rmdir()
        (stage / "fused").replace(out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _named(name: str, folder: Path) -> dict[str, str]:
    return {"name": name, "path": str(folder.absolute())}
