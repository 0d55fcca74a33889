"""Commands on checkpoint folders: quantize, perplexity."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.reporting import JsonOption, reporting
from qlora_core.errors import ConfigError

if TYPE_CHECKING:
    from qlora_core.config.quantize import QuantizeConfig


class QuantTypeOption(StrEnum):
    """The 4-bit data types."""

    NF4 = "nf4"
    FP4 = "fp4"
    E2M1 = "e2m1"
    INT4 = "int4"


def quantize(
    source: Annotated[
        str,
        typer.Argument(help="A checkpoint folder, or s3://BUCKET/PREFIX/v1/stage/STAGE/KEY.", show_default=False),
    ],
    target: Annotated[
        Path, typer.Argument(help="Where the 4-bit checkpoint goes; must not exist.", show_default=False)
    ],
    quant_type: Annotated[QuantTypeOption, typer.Option("--type", help="4-bit data type.")] = QuantTypeOption.NF4,
    blocksize: Annotated[int, typer.Option(help="Weights that share one absmax.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the absmax constants too.")] = True,
    quality: Annotated[
        Path | None,
        typer.Option("--quality", metavar="TEXT", help="Also report what four bits cost on this UTF-8 text."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="ROWS", help="Rows for errors of layer outputs; default: the text."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Quantize a checkpoint folder to a 4-bit one that AutoModelForCausalLM.from_pretrained loads.

    Weights are streamed: memory stays small whatever the model's size, and the same command goes on where a killed one
    ended. e2m1 and int4 have no kernels in bitsandbytes: qlora alone loads them.

    Examples:

      qlora quantize models/base models/base-nf4

      qlora quantize models/base models/base-fp4 --type fp4 --no-double-quant

      qlora quantize s3://bucket/prefix/v1/stage/base/KEY models/base-nf4

      qlora quantize models/base models/base-nf4 --quality held-out.txt --calibration rows.jsonl
    """
    with reporting(json) as report:
        from qlora_core.config.load import parse_section
        from qlora_core.config.quantize import QuantizeConfig

        settings = {"type": quant_type.value, "blocksize": blocksize, "double_quant": double_quant}
        config = parse_section(QuantizeConfig, settings, "quantize")
        made, measured = _quantize(source, target, config, quality, calibration)
        names = ("parameters", "bits_per_parameter", "relative_l2", "seconds", "peak_rss_bytes")
        page = str(target / "quality" / "quality.html") if measured else None
        report.data = {name: made[name] for name in names} | {"quality": page}
        report.say(
            f"{made['parameters']:,} parameters at {made['bits_per_parameter']:.3f} bits in the quantized layers"
        )
        report.say(f"relative L2 error {made['relative_l2']:.4f}; {made['seconds']:.1f} s; wrote {target}")
        if measured:
            before, after = (measured[name]["perplexity"] for name in ("full_precision", "quantized"))
            report.say(f"perplexity {before:.4f} in full precision, {after:.4f} quantized; report: {page}")


def _quantize(
    source: str, target: Path, config: "QuantizeConfig", text: Path | None, calibration: Path | None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What quantizing reports, and what the quality report found, if a text asks for one."""
    if text is not None:
        from qlora_core.quantization.quality import quantize_with_quality

        return quantize_with_quality(source, target, config, text, calibration)
    if calibration is not None:
        raise ConfigError("--calibration is for the quality report; name its text too: --quality TEXT")
    from qlora_core.quantization.publish import quantize_folder

    return quantize_folder(source, target, config), None


def perplexity(
    model: Annotated[Path, typer.Argument(help="A checkpoint folder, 4-bit or not.", show_default=False)],
    text: Annotated[Path, typer.Option("--text", help="A UTF-8 text file.", show_default=False)],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A PEFT adapter folder to put on the model.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Token-weighted loss of a model on a text; documents separated by <|endoftext|> are scored apart.

    Example:

      qlora perplexity models/base-nf4 --text held-out.txt --adapter out/adapter
    """
    with reporting(json) as report:
        from qlora_core.model.perplexity import score_text_file

        scored = score_text_file(model, text, adapter)
        report.data = {"loss": scored.loss, "perplexity": scored.perplexity, "tokens": scored.tokens}
        report.say(f"loss {scored.loss:.4f} nats per token, perplexity {scored.perplexity:.3f}, {scored.tokens} tokens")
