"""Where the sweep of a job stands: from its artifact where it is stored, else from its study. Builds nothing."""

from typing import Any

from qlora_core.pipeline.pipeline import Pipeline
from qlora_core.pipeline.run_record import trial_rows
from qlora_core.pipeline.stages import sweep_folder
from qlora_core.sweep.status import sweep_status

_STUDY_FILE, _STUDY = "study.db", "sweep"


def status_of(pipeline: Pipeline) -> dict[str, Any]:
    """`state`: waits for inputs | not begun | begun | done; `counts`, `trials`, `best`, `cost`, `study` (None: gone).

    Raises SweepError where the study cannot be read.
    """
    config = pipeline.job.config
    planned = next(stage for stage in pipeline.plan() if stage.name == "sweep")
    if planned.key is None:
        return {"state": "waits for inputs", "study": None, "counts": {}, "trials": [], "best": None, "cost": None}
    if planned.cached:
        swept = pipeline.document("sweep", "sweep.json")
        rows = trial_rows(swept)
        states = [row["state"] for row in rows]
        counts = {state: states.count(state) for state in sorted(set(states))}
        cost = (swept.get("cost") or {}).get("actual")
        return {"state": "done", "study": None, "counts": counts, "trials": rows, "best": swept["best"], "cost": cost}
    folder = sweep_folder(pipeline.job, planned.key)
    storage = config.sweep.storage
    where, name = (folder / _STUDY_FILE, _STUDY) if storage is None else (storage, folder.name)
    return sweep_status(where, name, config.compute.price_per_gpu_hour)
