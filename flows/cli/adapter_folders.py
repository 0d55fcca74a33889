"""Commands on one or several adapter folders: adapter inspect, diff, bisect, export, record."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.addresses import find_registered, is_address
from flows.cli.reporting import JsonOption, reporting

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into adapters, compare and export them.")
FolderArgument = Annotated[Path, typer.Argument(help="A PEFT adapter folder.", show_default=False)]
_SHOWN = 10


@app.command()
def inspect(
    adapter: Annotated[
        str, typer.Argument(help="A PEFT adapter folder, models:/NAME@ALIAS or models:/NAME/3.", show_default=False)
    ],
    registry: Annotated[
        Path | None, typer.Option(help="A pipeline.yaml: its registry knows models:/ addresses.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Norms, ranks in use and the layers that matter of an adapter.

    Examples:

      qlora adapter inspect out/adapter

      qlora adapter inspect models:/assistant@champion --registry pipeline.yaml
    """
    with reporting(json) as report:
        from qlora_core.adapters.inspect import inspect_adapter

        folder = find_registered(adapter, registry).adapter.folder if is_address(adapter) else Path(adapter)
        report.data = {**inspect_adapter(folder), "adapter": str(folder)}
        report.say(f"adapter: {folder}")
        report.say(f"rank {report.data['rank']} on {report.data['modules']} modules, norm {report.data['norm']:.4g}")
        report.say("share   norm      in use  effective  module")
        for layer in report.data["layers"][:_SHOWN]:
            report.say(
                f"{layer['share']:6.1%}  {layer['norm']:8.4g}  {layer['rank_99']:6}  {layer['effective_rank']:9.2f}  "
                f"{layer['module']}"
            )


@app.command()
def diff(
    first: FolderArgument,
    second: Annotated[Path, typer.Argument(help="Another one.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """How two adapters differ in what they do, whatever their ranks and scales.

    Example:

      qlora adapter diff out/monday out/tuesday
    """
    with reporting(json) as report:
        from qlora_core.adapters.inspect import diff_adapters

        report.data = diff_adapters(first, second)
        relative = report.data["relative_difference"]
        told = "-" if relative is None else f"{relative:.3%}"
        report.say(f"cosine {report.data['cosine']:.4f}; difference {told} of the first's norm")
        for layer in report.data["layers"][:_SHOWN]:
            report.say(f"  {layer['difference']:8.4g}  cosine {layer['cosine']:7.4f}  {layer['module']}")


@app.command()
def bisect(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders, all active together.", show_default=False)],
    base: Annotated[Path, typer.Option(help="Their 4-bit base.", show_default=False)],
    text: Annotated[Path, typer.Option(help="The UTF-8 text that got worse.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """Which adapter, block and module makes a text worse than it is on the base.

    Example:

      qlora adapter bisect out/a out/b --base models/base-nf4 --text regressed.txt
    """
    with reporting(json) as report:
        from qlora_core.adapters.bisect import bisect_regression

        report.data = bisect_regression(base, adapters, text)
        loss, moved = report.data["loss"], report.data["regression"]
        report.say(
            f"loss {loss['base']:.4f} on the base, {loss['adapters']:.4f} with adapters: {moved['value']:+.4f} "
            f"[{moved['low']:+.4f}, {moved['high']:+.4f}]"
        )
        for entry in report.data["by_adapter"]:
            report.say(f"  without {entry['adapter']}: {-entry['given_back']:+.4f}")
        culprit = report.data["culprit"]
        report.say("no regression beyond chance" if culprit is None else "most harm: " + ", ".join(culprit.values()))


@app.command()
def export(
    adapter: FolderArgument,
    out: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    base: Annotated[Path | None, typer.Option(help="Its 4-bit base: golden logits are made anew, fit checked.")] = None,
    rank: Annotated[int | None, typer.Option(help="Zero-pad up to this rank.")] = None,
    json: JsonOption = False,
) -> None:
    """Write an adapter in the one form that stock PEFT, vLLM and SGLang read alike, with a portability report.

    Example:

      qlora adapter export out/adapter out/portable --base models/base-nf4
    """
    with reporting(json) as report:
        from qlora_core.adapters.export import export_canonical

        report.data = {**export_canonical(adapter, out, base=base, rank=rank), "adapter": str(out)}
        report.say(f"wrote {out}: rank {report.data['rank']}, alpha = rank, scale in B")
        for name, reader in report.data["readers"].items():
            told = ", ".join(reader["needs"] + reader["why"]) or "as it is"
            report.say(f"  {name}: {'yes' if reader['ok'] else 'no'} ({told})")


@app.command()
def record(
    merged: Annotated[Path, typer.Argument(help="A folder that `qlora merge` wrote.", show_default=False)],
    version: Annotated[str, typer.Argument(help="models:/NAME/3 or models:/NAME@ALIAS.", show_default=False)],
    registry: Annotated[Path, typer.Option(help="A pipeline.yaml: its registry knows the version.")],
    json: JsonOption = False,
) -> None:
    """Put a merged checkpoint's certificate on the registered version it was merged from. Doing it again is no harm.

    Refused where the certificate is of another adapter, or the folder no longer holds what was certified.

    Example:

      qlora adapter record out/merged models:/assistant/3 --registry pipeline.yaml
    """
    with reporting(json) as report:
        from qlora_core.adapters.merged import certificate_of
        from qlora_core.registry.parity_certificate import record_certificate

        certificate = certificate_of(merged)
        registered = find_registered(version, registry)
        found = registered.adapter
        digest = record_certificate(registered.tracking_uri, found, certificate)
        report.data = {"model": found.name, "version": found.version, "certificate_sha256": digest}
        report.say(f"version {found.version} of {found.name} has certificate {digest}")
