"""The base class of every config section: strict, frozen, and picky about names."""

from pydantic import BaseModel, ConfigDict

SECRET = "secret"
"""The type of a fault whose value must not be shown."""


class Section(BaseModel):
    """One section of the pipeline config: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
