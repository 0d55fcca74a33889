"""The `data` section: where rows come from and how they become training rows."""

from typing import Literal

from pydantic import Field, model_validator

from qlora_core.config.section import Section


class SplitConfig(Section):
    """Shares of the rows held out. A row's side is a salted hash of its prompt, so added rows move nobody."""

    validation: float = Field(default=0.1, gt=0, lt=1, description="share that steers the sweep")
    test: float = Field(default=0.1, gt=0, lt=1, description="share that is looked at once, by evaluation")
    salt: str = Field(default="qlora", description="change it to draw another split")

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> "SplitConfig":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation ({self.validation}) and test ({self.test}) together leave nothing to train on; "
                "their sum must be under 1"
            )
        return self


class DataConfig(Section):
    """Sources, the split, and what happens to rows that do not fit."""

    sources: list[str] = Field(min_length=1, description="files or folders; formats are recognised by content")
    split: SplitConfig = SplitConfig()
    chat_template: str | None = Field(
        default=None, description="a Jinja file; default: the base tokenizer's own template"
    )
    max_tokens: int = Field(
        default=512, ge=8, description="longest row, in the base tokenizer's tokens after the template"
    )
    over_long: Literal["drop", "cut"] = Field(
        default="drop", description="cut trains the kept part without a stop token"
    )
    max_quarantined_share: float = Field(
        default=0.2, ge=0, le=1, description="more unreadable rows than this stop the run"
    )
