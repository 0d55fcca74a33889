"""The `gate` section: what a challenger must show before it becomes champion."""

from typing import Literal

from pydantic import Field

from qlora_core.config.section import Section


class GateConfig(Section):
    """The challenger must beat the champion (or, with no champion, the base) beyond chance."""

    min_loss_gain: float = Field(default=0.0, ge=0, description="nats per token the whole interval must lie above")
    min_rows: int = Field(default=30, ge=2, description="fewer scored test rows than this: HOLD")
    max_exact_match_loss: float = Field(default=0.02, ge=0, le=1, description="largest tolerated fall in exact match")
    max_unscored_share: float = Field(
        default=0.02, ge=0, le=1, description="more unscored verdicts than this void the judge"
    )
    judge: Literal["ignore", "require"] = Field(
        default="ignore",
        description="require: the judge's win rate must lie above one half, and the judge be certified",
    )
