"""The `gate.shadow` section: a time in which a candidate answers beside the champion, and what sends it back."""

from pydantic import Field, model_validator

from qlora_core.config.section import Section


class ShadowConfig(Section):
    """After PROMOTE, before the alias moves. Off until `period_s` is set; the first champion has nobody beside it."""

    period_s: float = Field(default=0.0, ge=0, description="how long a candidate answers beside the champion; 0: not")
    prompts: str | None = Field(
        default=None, min_length=1, description="JSON Lines that grow, each with a `prompt`: what users asked"
    )
    min_prompts: int = Field(default=50, ge=1, description="fewer answered by the end: the candidate goes back")
    max_degenerate_increase: float = Field(default=0.02, ge=0, le=1, description="in the share of such answers")
    max_refusal_increase: float = Field(default=0.05, ge=0, le=1, description="in the share of refused prompts")
    length_ratio: tuple[float, float] = Field(
        default=(0.5, 2.0), description="bounds of an answer's words, candidate over champion"
    )
    alpha: float = Field(
        default=0.05, gt=0, lt=0.5, description="chance of sending a good candidate back, however often it is looked at"
    )

    @model_validator(mode="after")
    def _period_has_prompts(self) -> "ShadowConfig":
        if self.period_s > 0 and self.prompts is None:
            raise ValueError("shadow.period_s needs shadow.prompts: a file of what users asked")
        if not 0 < self.length_ratio[0] < self.length_ratio[1]:
            raise ValueError(f"shadow.length_ratio is {list(self.length_ratio)}; give [lowest, highest], as [0.5, 2.0]")
        return self
