"""What a merged checkpoint must keep of its adapter, and how the ways of making it are tried."""

from typing import Literal

from pydantic import Field

from qlora_core.config.section import Section

Candidate = Literal["dequantized-rtn", "dequantized-calibrated", "original-rtn", "original-calibrated"]


class MergeConfig(Section):
    """Thresholds of the parity certificate; all must hold, else nothing is written."""

    min_gain_16bit: float = Field(default=0.999, ge=0, description="share of the adapter's gain that must be left")
    min_gain_4bit: float = Field(default=0.97, ge=0, description="the same for a 4-bit target")
    min_projection: float = Field(default=0.95, description="<eff, delta> / <delta, delta> must not be under this")
    max_projection: float = Field(default=1.05, description="nor over this")
    max_kl_16bit: float = Field(default=1e-4, gt=0, description="nats per token from the adapter on its base")
    max_kl_4bit: float = Field(default=1e-2, gt=0, description="the same for a 4-bit target")
    min_top1_16bit: float = Field(default=0.99, ge=0, le=1, description="share of tokens with the same first choice")
    min_top1_4bit: float = Field(default=0.9, ge=0, le=1, description="the same for a 4-bit target")
    candidates: list[Candidate] = Field(
        default=["dequantized-rtn", "dequantized-calibrated", "original-rtn", "original-calibrated"],
        min_length=1,
        description="4-bit ways that are tried; those on the original need its folder",
    )
    min_predicted_projection: float = Field(
        default=0.5, description="rounding to nearest is not even tried where the grid swallows more than this leaves"
    )
    calibration_tokens: int = Field(default=4096, ge=64, description="drawn from the adapter's own answers")
    measured_tokens: int = Field(default=4096, ge=64, description="drawn alike where no text is given")
    hessian_bytes: int = Field(default=1 << 30, ge=1 << 20, description="memory for input statistics at a time")
    dampening: float = Field(default=0.01, gt=0, description="of the statistics' mean diagonal (GPTQ's percdamp)")
    max_shard_bytes: int = Field(default=2_000_000_000, ge=1_000_000)
    seed: int = Field(default=0, ge=0)
