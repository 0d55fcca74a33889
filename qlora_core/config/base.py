"""The `base` section: the frozen pretrained model."""

from pydantic import Field

from qlora_core.config.section import Section


class BaseConfig(Section):
    """Which pretrained model is quantized and frozen."""

    model: str = Field(description="a checkpoint folder, a hub name, or `demo` for the small model made on the spot")
    revision: str | None = Field(
        default=None, description="hub commit; needed for a hub name so that runs can be repeated"
    )
