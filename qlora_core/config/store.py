"""The `store` section: where artifacts are kept. A plain string is short for its `url`."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from qlora_core.config.section import Section


class StoreConfig(Section):
    """The artifact store. Everything but `url` is for buckets, which are read through copies on this machine."""

    url: str = Field(default="./.qlora", min_length=1, description="a folder or s3://bucket/prefix")
    cache_limit_gb: float = Field(
        default=200.0, gt=0, description="local copies of a bucket's files, oldest use first out"
    )
    encryption: Literal["none", "AES256", "aws:kms"] = Field(
        default="none", description="asked of the server on writes"
    )
    kms_key_id: str | None = Field(default=None, description="with aws:kms: the key, else the account's own")
    lease_ttl_s: float = Field(default=60.0, ge=1, description="a producer silent for so long is replaced by another")

    @model_validator(mode="before")
    @classmethod
    def _from_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _key_belongs_to_kms(self) -> Self:
        if self.kms_key_id is not None and self.encryption != "aws:kms":
            raise ValueError("kms_key_id needs encryption: aws:kms")
        return self
