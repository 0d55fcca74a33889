"""Reading one finished registration straight from MLflow's SQLite file, without importing MLflow.

MLflow takes seconds to import, and a run for which nothing has changed has nothing else to do. Only ever reads, and
only says yes: whatever it does not find or understand is left to the client to answer.
"""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from qlora_core.registry.versions import RUN_KEY_TAG

_QUERY = """
    SELECT done.value FROM model_version_tags AS done
    JOIN model_version_tags AS run ON run.name = done.name AND run.version = done.version
    JOIN model_versions AS live ON live.name = done.name AND live.version = done.version
    WHERE done.name = ? AND done.key = ? AND run.key = ? AND run.value = ? AND live.current_stage != 'Deleted_Internal'
    ORDER BY done.version DESC
"""


def finished_registration(database: Path, model_name: str, run_key: str, tag: str) -> dict[str, Any] | None:
    """The newest registration of `run_key` that `tag` records as done; None where there is none or none can be read."""
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute(_QUERY, (model_name, tag, RUN_KEY_TAG, run_key)).fetchall()
    except sqlite3.Error:
        return None  # being migrated, or of another schema: the client will say
    entries = [json.loads(value) for (value,) in rows]
    return next((entry["registration"] for entry in entries if entry["state"] == "done"), None)
