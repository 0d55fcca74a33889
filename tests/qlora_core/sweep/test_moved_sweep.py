"""A sweep that is interrupted on one machine is finished on another, which has nothing but the store."""

from pathlib import Path
from typing import Any

import pytest

from qlora_core.config.compute import ComputeConfig
from qlora_core.config.sweep import SweepConfig
from qlora_core.config.train import TrainConfig
from qlora_core.store.store import open_store
from qlora_core.store.work import WorkArea
from qlora_core.sweep import adapter_card
from qlora_core.sweep.run import SweepWork, run_sweep

KEY = "0123456789abcdef"
TRAIN = TrainConfig(
    lora_rank=4,
    lora_dropout=0.1,
    max_steps=8,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    optimizer="adamw",
    checkpoint_every_steps=1,
    precision="float32",
)
SWEEP = SweepConfig(space={"learning_rate": [1e-6, 5e-3, 1e-3]}, seed=3)
ONE_WORKER = ComputeConfig(workers=1)
LINEAGE: dict[str, str] = {**dict.fromkeys(adapter_card.LINEAGE, "x")}


class _PowerCut(BaseException):
    """The driver's machine is gone."""


def checkpoints(work: SweepWork, trial: str) -> list[str]:
    return sorted(path.name for path in (work.trials_dir / trial).glob("step-*"))


def lasting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without the time that was spent on them."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.integration
def test_sweep_is_finished_elsewhere_as_if_nothing_had_happened(
    local_ray: None, quantized: Path, curated: Path, tmp_path: Path
) -> None:
    store = {"url": str(tmp_path / "store"), "cache_dir": str(tmp_path / "cache")}

    def work_of(machine: str, settings: dict[str, Any] | None) -> tuple[SweepWork, Path]:
        out = tmp_path / machine / "out"
        out.mkdir(parents=True)
        folder = tmp_path / machine / "sweeps" / KEY
        return SweepWork(quantized, curated, folder, LINEAGE, settings, "stage/sweep/x", {"curate": "d" * 64}), out

    undisturbed, undisturbed_out = work_of("undisturbed", None)
    expected = run_sweep(SWEEP, TRAIN, ONE_WORKER, undisturbed, undisturbed_out)
    steps = {row["id"]: row["steps"] for row in expected["trials"]}
    assert sorted(steps.values()) == [2, 4, 8]

    def cut_at_the_second_rung(row: dict[str, Any]) -> None:
        if row["id"] == expected["best"] and row["steps"] == 4:
            raise _PowerCut

    first, first_out = work_of("first", store)
    with pytest.raises(_PowerCut):
        run_sweep(SWEEP, TRAIN, ONE_WORKER, first, first_out, cut_at_the_second_rung)

    second, second_out = work_of("second", store)
    summary = run_sweep(SWEEP, TRAIN, ONE_WORKER, second, second_out)
    assert lasting(summary["trials"]) == lasting(expected["trials"])
    assert (summary["best"], summary["varied"]) == (expected["best"], expected["varied"])
    for file in ("adapter/adapter_model.safetensors", "adapter/golden.safetensors"):
        assert (second_out / file).read_bytes() == (undisturbed_out / file).read_bytes()
    # Whoever trains from the beginning has written the step before, too.
    (pruned,) = [name for name, reached in steps.items() if reached == 2]
    assert checkpoints(undisturbed, pruned) == ["step-00000001", "step-00000002"]
    assert checkpoints(second, pruned) == ["step-00000002"]
    backend = open_store(store["url"], store["cache_dir"]).backend
    kept = {name: WorkArea(backend, f"sweep/{KEY}/{name}").newest() for name in steps}
    labels = {name: f"step-{reached:08d}" for name, reached in steps.items()}
    assert {name: snapshot and snapshot.label for name, snapshot in kept.items()} == labels
