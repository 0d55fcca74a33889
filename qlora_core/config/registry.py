"""The `registry` section: where adapters are registered."""

from pydantic import Field

from qlora_core.config.section import Section


class RegistryConfig(Section):
    """MLflow tracking and model registry."""

    model_name: str = Field(
        default="assistant", pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.-]*$", description="registered model"
    )
    experiment: str = Field(default="qlora-fleet", min_length=1)
    tracking_uri: str | None = Field(default=None, description="an MLflow server; default: SQLite in the work folder")
