"""Commands on checkpoint folders: quantize, perplexity."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.reporting import JsonOption, reporting


class QuantTypeOption(StrEnum):
    """The 4-bit data types."""

    NF4 = "nf4"
    FP4 = "fp4"


def quantize(
    source: Annotated[Path, typer.Argument(help="A Hugging Face checkpoint folder.", show_default=False)],
    target: Annotated[
        Path, typer.Argument(help="Where the 4-bit checkpoint goes; must not exist.", show_default=False)
    ],
    quant_type: Annotated[QuantTypeOption, typer.Option("--type", help="4-bit data type.")] = QuantTypeOption.NF4,
    blocksize: Annotated[int, typer.Option(help="Weights that share one absmax.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the absmax constants too.")] = True,
    json: JsonOption = False,
) -> None:
    """Quantize a checkpoint folder to a 4-bit one that AutoModelForCausalLM.from_pretrained loads.

    Examples:

      qlora quantize models/base models/base-nf4

      qlora quantize models/base models/base-fp4 --type fp4 --no-double-quant
    """
    with reporting(json) as report:
        from qlora_core.config.load import parse_section
        from qlora_core.config.quantize import QuantizeConfig
        from qlora_core.quantization.publish import quantize_folder

        settings = {"type": quant_type.value, "blocksize": blocksize, "double_quant": double_quant}
        made = quantize_folder(source, target, parse_section(QuantizeConfig, settings, "quantize"))
        names = ("parameters", "bits_per_parameter", "relative_l2", "seconds", "peak_rss_bytes")
        report.data = {name: made[name] for name in names}
        report.say(
            f"{made['parameters']:,} parameters at {made['bits_per_parameter']:.3f} bits in the quantized layers"
        )
        report.say(f"relative L2 error {made['relative_l2']:.4f}; {made['seconds']:.1f} s; wrote {target}")


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
