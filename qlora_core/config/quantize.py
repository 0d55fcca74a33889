"""The `quantize` section: how the base model is stored in four bits."""

from typing import Literal

from pydantic import Field

from qlora_core.config.section import Section

Blocksize = Literal[64, 128, 256, 512, 1024, 2048, 4096]


class QuantizeConfig(Section):
    """The 4-bit storage format (Dettmers et al. 2023, sections 3 and appendix E)."""

    type: Literal["nf4", "fp4"] = "nf4"
    blocksize: Blocksize = 64
    double_quant: bool = Field(default=True, description="quantize the absmax constants too: 4.127 instead of 4.5 bits")
    skip_modules: list[str] = Field(
        default=["lm_head"], description="Linear modules kept in full precision, by name ending"
    )
