"""The `quantize` section: how the base model is stored in four bits."""

from typing import Literal

from pydantic import Field

from qlora_core.config.section import Section

Blocksize = Literal[64, 128, 256, 512, 1024, 2048, 4096]

QuantType = Literal["nf4", "fp4", "e2m1", "int4"]


class QuantizeConfig(Section):
    """The 4-bit storage format (Dettmers et al. 2023, sections 3 and appendix E)."""

    type: QuantType = Field(
        default="nf4", description="fp4 is bitsandbytes' own; e2m1 and int4 run through qlora's layers alone"
    )
    blocksize: Blocksize = 64
    double_quant: bool = Field(default=True, description="quantize the absmax constants too: 4.127 instead of 4.5 bits")
    skip_modules: list[str] = Field(
        default=["lm_head"], description="Linear modules kept in full precision, by name ending"
    )
    max_shard_bytes: int = Field(
        default=2_000_000_000, ge=1_000_000, description="weights are split into files of at most this size"
    )
    quality_text: str | None = Field(
        default=None,
        description="a text file: the report says what four bits cost on it; naming another makes the base anew",
    )
