"""The `gate` section: what a challenger must show before it becomes champion."""

from typing import Literal

from pydantic import Field, model_validator

from qlora_core.config.section import Section
from qlora_core.config.shadow import ShadowConfig


class PrimaryConfig(Section):
    """The one comparison that a promotion rests on: challenger against champion or, without one, the base, paired."""

    metric: Literal["loss", "exact_match", "judge"] = Field(
        default="loss",
        description="held-out loss (nats per token); share of prompts answered exactly; or the judge's win rate",
    )
    rule: Literal["superiority", "non_inferiority"] = Field(
        default="superiority",
        description="better beyond chance, or not worse by more than `margin`",
    )
    margin: float = Field(default=0.0, ge=0, description="non_inferiority: the fall tolerated, in the metric's unit")
    min_gain: float = Field(
        default=0.0,
        ge=0,
        description="superiority: what the whole interval must lie above, in the metric's unit (judge: above one half)",
    )
    test: Literal["fixed_n", "always_valid"] = Field(
        default="fixed_n",
        description="always_valid: wider, and true however often the evidence is read as items are added",
    )
    alpha: float | None = Field(
        default=None, gt=0, lt=0.5, description="two-sided error; null: 1 - confidence of the recorded interval"
    )

    @model_validator(mode="after")
    def _margin_belongs_to_its_rule(self) -> "PrimaryConfig":
        if (self.rule == "non_inferiority") != (self.margin > 0):
            raise ValueError("rule: non_inferiority needs a margin above 0, and superiority has none (see min_gain)")
        if self.rule == "non_inferiority" and self.min_gain > 0:
            raise ValueError("min_gain is asked for under rule: superiority only; leave it out")
        return self


class SlicesConfig(Section):
    """No part of the data may get worse: the primary metric, per slice."""

    by: Literal["none", "category", "language"] = Field(default="none", description="the rows' label; none: no check")
    margin: float = Field(default=0.05, ge=0, description="the fall tolerated in a slice, in the primary metric's unit")
    min_items: int = Field(default=30, ge=2, description="a slice with fewer items is underpowered")
    underpowered: Literal["waive", "hold", "pool"] = Field(
        default="hold",
        description="slices that could not show a fall of `margin`: pass them, HOLD, or join them into one slice",
    )


class GuardsConfig(Section):
    """What may not break, whatever the primary metric gains. Each is off (null) until it is set.

    A guard that is set and whose figure the evidence lacks makes it INVALID.
    """

    max_perplexity_increase: float | None = Field(
        default=None, ge=0, description="on evaluate.general_text, as a share: 0.02 is 2 %"
    )
    length_ratio: tuple[float, float] | None = Field(
        default=None, description="bounds of the answers' total words, challenger over champion"
    )
    max_refusal_increase: float | None = Field(default=None, ge=0, le=1, description="in the share of refused prompts")
    max_degenerate_share: float | None = Field(
        default=None, ge=0, le=1, description="of answers that are empty, loop or repeat the question"
    )
    max_format_loss: float | None = Field(
        default=None, ge=0, le=1, description="in the share of answers in their reference's form (JSON, `#### N`)"
    )
    max_latency_ratio: float | None = Field(
        default=None,
        gt=0,
        description="seconds per token (evaluate.latency_prompts), challenger over champion",
    )
    max_adapter_bytes: int | None = Field(default=None, ge=1, description="size of the adapter's weights")
    base_digest: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="the quantized base (artifact digest) that is served",
    )
    parity: bool = Field(
        default=False, description="the merged model's parity certificate (evaluate.parity_certificate) must pass"
    )

    @model_validator(mode="after")
    def _bounds_in_order(self) -> "GuardsConfig":
        if self.length_ratio is not None and not 0 <= self.length_ratio[0] < self.length_ratio[1]:
            raise ValueError(f"length_ratio is {list(self.length_ratio)}; give [lowest, highest], such as [0.6, 1.6]")
        return self


class HumansConfig(Section):
    """Human votes (evaluate.votes) beside the judge's verdicts."""

    combine: Literal["ppi", "ignore"] = Field(
        default="ppi", description="ppi: votes correct the judge's win rate (prediction-powered inference)"
    )
    min_prompts: int = Field(default=60, ge=2, description="prompts with votes; fewer: HOLD")
    min_alpha: float | None = Field(
        default=None, ge=-1, le=1, description="the raters' agreement (Krippendorff's alpha, nominal); lower: HOLD"
    )


class GateConfig(Section):
    """The challenger must beat the champion (or, with no champion, the base) beyond chance."""

    min_loss_gain: float = Field(default=0.0, ge=0, description="nats per token the whole interval must lie above")
    min_rows: int = Field(default=30, ge=2, description="fewer scored items of the primary metric than this: HOLD")
    max_exact_match_loss: float = Field(default=0.02, ge=0, le=1, description="largest tolerated fall in exact match")
    max_unscored_share: float = Field(
        default=0.02, ge=0, le=1, description="more unscored verdicts than this void the judge"
    )
    judge: Literal["ignore", "require"] = Field(
        default="ignore",
        description="require: the judge's win rate must lie above one half, and the judge be certified",
    )
    approve: Literal["auto", "manual"] = Field(
        default="auto", description="manual: after PROMOTE a person decides; until then, and without an answer, HOLD"
    )
    approve_timeout_s: float = Field(default=72 * 3600, gt=0, description="how long approve: manual waits")
    primary: PrimaryConfig = PrimaryConfig()
    slices: SlicesConfig = SlicesConfig()
    guards: GuardsConfig = GuardsConfig()
    humans: HumansConfig = HumansConfig()
    shadow: ShadowConfig = ShadowConfig()
