"""How long trials are over a curated set, in steps and trained tokens. Knows folders and schedules, no models."""

from dataclasses import dataclass
from pathlib import Path

from qlora_core.config.train import TrainConfig
from qlora_core.errors import DataError
from qlora_core.sweep.rungs import TrialLength
from qlora_core.training.schedule import total_steps, warmup_steps


@dataclass(frozen=True)
class TrainedRows:
    """What batches are made of: `count` units (see `trained_rows`) with `tokens` trained tokens in all."""

    count: int
    tokens: int

    def length_of(self, params: TrainConfig) -> TrialLength:
        """Steps of a trial, its warm-up, and trained tokens of a step on the mean; TrainingError without rows."""
        total = total_steps(params, self.count)
        batch = min(params.micro_batch_size * params.gradient_accumulation_steps, self.count)
        return TrialLength(total, warmup_steps(params, total), max(1.0, batch * self.tokens / self.count))


def trained_rows(curated: Path, objective: str) -> TrainedRows:
    """What a batch is made of: preference pairs for dpo; packed sequences where there are any; else training rows.

    Only what has a trained token counts, a pair in both answers. The first token of a row is never predicted, and so
    never trained.

    Raises:
        DataError: the folder is no curated set, or has no pairs where the objective needs them.
    """
    import polars

    from qlora_core.data.packing import count_packs
    from qlora_core.data.shards import shard_files

    packs = count_packs(curated)
    masks = ["loss_mask"] if objective == "sft" else ["loss_mask", "rejected_mask"]
    try:
        rows = polars.scan_parquet(shard_files(curated, "train"))
        if lacking := set(masks) - set(rows.collect_schema().names()):
            raise DataError(
                f"{curated} has no {', '.join(lacking)}, which train.objective {objective} needs: curate again"
            )
        trained = polars.all_horizontal(*(polars.col(mask).list.slice(1).list.any().fill_null(False) for mask in masks))
        tokens = polars.sum_horizontal(*(polars.col(mask).list.slice(1).list.sum().fill_null(0) for mask in masks))
        counted = rows.filter(trained).select(polars.len(), tokens.sum().alias("tokens")).collect()
        count, total = (int(value or 0) for value in counted.row(0))
        return TrainedRows(packs if packs is not None and objective == "sft" else count, total)
    except (OSError, polars.exceptions.PolarsError) as error:
        raise DataError(f"{curated} is no curated set: {error}; curate the data again") from error
