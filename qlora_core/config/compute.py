"""The `compute` section: on what the job runs. Nothing here changes a result, so nothing here is part of a key.

How many trials are trained at once changes their losses in float32 by rounding (docs/training.md). Residency changes no
bit of a result on the CPU. On a GPU the order of sums may differ, as it does between two models of GPU, which are no
part of a key either: a result made in one residency stands for all.
"""

from typing import Any, Literal

from pydantic import Field

from qlora_core.config.section import Section


class ComputeConfig(Section):
    """Workers of the sweep, how the base's layers execute on them, and the folder for local state."""

    workers: int | None = Field(
        default=None, ge=1, description="default: one per GPU, else one per CPU core, at most four"
    )
    pack_size: int | None = Field(
        default=None, ge=1, description="trials a worker trains at once; default: as many as keep it busy, 8 at most"
    )
    gpus: Literal["auto", "required", "none"] = Field(
        default="auto",
        description="auto: GPU workers where the cluster has GPUs now; required: refuse, or wait for nodes, without",
    )
    ray_address: str | None = Field(
        default=None, description="an existing Ray cluster; default: one is started and ended"
    )
    sweeps_at_once: int | None = Field(
        default=None, ge=1, description="how many sweeps of Prefect flows may share the cluster; others wait"
    )
    work_dir: str = Field(default="./.qlora", description="checkpoints, study, MLflow's SQLite, logs, resolved configs")
    residency: Literal["auto", "dense", "scratch", "bitsandbytes"] = Field(
        default="auto",
        description="how 4-bit layers execute: dequantized and kept (dense), dequantized for each product into one "
        "buffer (scratch), or by bitsandbytes' kernels; auto: dense for as many layers as fit, scratch for the rest",
    )
    layer_residency: dict[str, Literal["dense", "scratch", "bitsandbytes"]] = Field(
        default={}, description="by layer name pattern (*.down_proj), before residency; the first that matches counts"
    )
    worker_start_timeout_s: float = Field(
        default=180.0, gt=0, description="longest wait for the first worker to be ready"
    )

    idle_worker_s: float = Field(
        default=60.0, ge=1, description="how long a worker without work is kept before its GPU is given back"
    )
    price_per_gpu_hour: float | None = Field(
        default=None, ge=0, description="of a worker, in any currency: costs are reckoned with it"
    )

    @property
    def residency_settings(self) -> dict[str, Any]:
        """What of this section `load_quantized` takes, as its arguments."""
        return {"residency": self.residency, "layer_residency": self.layer_residency}
