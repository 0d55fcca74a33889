"""The `data` section: where rows come from and how they become training rows."""

from typing import Literal

from pydantic import Field

from qlora_core.config.curation import (
    DecontaminateConfig,
    NearDuplicatesConfig,
    PackingConfig,
    PolicyConfig,
    ReadersConfig,
    SelectionConfig,
    SplitConfig,
    TagsConfig,
)
from qlora_core.config.section import Section


class DataConfig(Section):
    """Sources, in order of priority, and what happens to their rows."""

    sources: list[str] = Field(
        min_length=1, description="files, folders, hub names with a commit, s3:// paths; formats are known by content"
    )
    readers: ReadersConfig = ReadersConfig()
    tags: TagsConfig = TagsConfig()
    policy: PolicyConfig = PolicyConfig()
    near_duplicates: NearDuplicatesConfig = NearDuplicatesConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    split: SplitConfig = SplitConfig()
    selection: SelectionConfig = SelectionConfig()
    packing: PackingConfig = PackingConfig()
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
    shard_rows: int = Field(default=100_000, ge=1, description="most rows of one Parquet file")
