"""The `compute` section: on what the job runs. Nothing here changes a result, so nothing here is part of a key."""

from pydantic import Field

from qlora_core.config.section import Section


class ComputeConfig(Section):
    """Workers of the sweep and the folder for local state."""

    workers: int | None = Field(
        default=None, ge=1, description="default: one per GPU, else one per CPU core, at most four"
    )
    ray_address: str | None = Field(
        default=None, description="an existing Ray cluster; default: one is started and ended"
    )
    work_dir: str = Field(default="./.qlora", description="checkpoints, study, MLflow's SQLite, logs, resolved configs")
    worker_start_timeout_s: float = Field(
        default=180.0, gt=0, description="longest wait for the first worker to be ready"
    )
