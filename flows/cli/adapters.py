"""Commands on adapter folders: compose and merge."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from flows.cli.addresses import base_in_store, find_registered, is_address
from flows.cli.reporting import JsonOption, Report, reporting
from qlora_core.errors import ConfigError, RegistryError

if TYPE_CHECKING:
    from flows.cli.addresses import Registered
    from qlora_core.config.section import Section

S = TypeVar("S", bound="Section")


class MergeTarget(StrEnum):
    """What a merged checkpoint is stored as."""

    SIXTEEN_BIT = "16bit"
    NF4 = "nf4"


def compose(
    recipe: Annotated[Path, typer.Argument(help="The recipe, YAML or JSON.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Where the adapter goes: a new folder.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """Make one adapter of several: sums, weights given or learned, sequences, TIES, DARE, compression.

    The folder is a cache entry of the recipe, which names base, parents and weights by digest: the same recipe gives
    the same bytes, and is found when it is asked for again.

    Example:

      qlora compose recipe.yaml out/both
    """
    with reporting(json) as report:
        from qlora_core.adapters.compose import compose as compose_recipe

        report.data = compose_recipe(recipe, out)
        weights = ", ".join(f"{name} {weight:.4g}" for name, weight in report.data["weights"].items())
        report.say(f"{'found' if report.data['cached'] else 'wrote'} {out}: rank {report.data['rank']}, {weights}")
        if report.data["relative_error"]:
            report.say(f"lost in the SVD: {report.data['relative_error']:.3%} of the delta's norm")
        report.say(f"recipe {report.data['recipe']}")


def merge(
    adapter: Annotated[
        str, typer.Argument(help="A PEFT adapter folder, models:/NAME@ALIAS or models:/NAME/3.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Where the checkpoint goes: a new folder.", show_default=False)],
    target: Annotated[MergeTarget, typer.Option(help="How weights are stored.")] = MergeTarget.SIXTEEN_BIT,
    base: Annotated[
        Path | None,
        typer.Option(
            help="The 4-bit base; default: for models:/ the one it was trained on, from the config's store; for a "
            "folder the one that its own settings name.",
            show_default=False,
        ),
    ] = None,
    original: Annotated[
        Path | None, typer.Option(help="The checkpoint the base was quantized from: more ways for nf4.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text to measure on; default: the adapter's own samples.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Other text for calibrated rounding; default: the adapter's own samples.")
    ] = None,
    registry: Annotated[
        Path | None,
        typer.Option(help="A pipeline.yaml: its registry knows models:/, its store the base.", show_default=False),
    ] = None,
    no_record: Annotated[
        bool, typer.Option("--no-record", help="Leave the registered version as it is; the certificate is in OUT.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A threshold, e.g. --set merge.min_gain_4bit=0.9."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Merge an adapter into its base as a standalone checkpoint, with a certificate of what it kept; or refuse.

    The certificate of a registered version is put on that version, too.

    Examples:

      qlora merge out/adapter out/merged --base models/base-nf4 --text held-out.txt

      qlora merge out/adapter out/merged --target nf4 --base models/base-nf4 --original models/base

      qlora merge models:/assistant@champion out/merged --registry pipeline.yaml
    """
    with reporting(json) as report:
        from qlora_core.adapters.merge import MergeRequest
        from qlora_core.adapters.merge import merge as merge_adapter
        from qlora_core.config.merge import MergeConfig

        config = _overridden(MergeConfig, "merge", overrides or ())
        registered = find_registered(adapter, registry) if is_address(adapter) else None
        folder = Path(adapter) if registered is None else registered.adapter.folder
        base = base or _default_base(folder, registered)
        request = MergeRequest(folder, base, out, target.value, original, text, calibration)
        report.data = {**merge_adapter(request, config), "recorded": None}
        gain = report.data["gain_retained"]
        report.say(f"wrote {out} ({report.data['chosen']}): gain retained {'-' if gain is None else f'{gain:.4f}'}")
        report.say(f"KL {report.data['kl']:.3g} nats per token, top-1 agreement {report.data['top1_agreement']:.4f}")
        report.say(f"certificate: {report.data['certificate']}")
        if registered is not None and not no_record:
            _record(report, registered, out)


def _record(report: Report, registered: "Registered", out: Path) -> None:
    from qlora_core.registry.parity_certificate import record_certificate

    found = registered.adapter
    try:
        digest = record_certificate(registered.tracking_uri, found, Path(report.data["certificate"]))
    except RegistryError as error:
        again = f"qlora adapter record {out} models:/{found.name}/{found.version} --registry CONFIG"
        raise RegistryError(
            f"{out} is written, its certificate is not on the version: {error}; then `{again}`"
        ) from error
    report.data["recorded"] = {"model": found.name, "version": found.version, "certificate_sha256": digest}
    report.say(f"recorded with version {found.version} of {found.name}")


def _default_base(adapter: Path, registered: "Registered | None") -> Path:
    """The stored base that a registered adapter was trained on; for another, the folder in its own settings."""
    if registered is not None:
        found = registered.adapter
        of = f"version {found.version} of {found.name}"
        return base_in_store(registered.config, found.quantized_base_digest, of=of, option="--base")
    from qlora_core.model.adapter import read_adapter_config

    named = read_adapter_config(adapter).base_model_name_or_path
    if not named or not Path(named).is_dir():
        raise ConfigError(
            f"{adapter} names no base folder on this machine ({named!r}); give it with --base: `qlora run` ends with "
            "the folder of its base"
        )
    return Path(named)


def _overridden(section: type[S], name: str, overrides: Sequence[str]) -> S:
    """A section whose settings are its defaults and `name.key=value` overrides."""
    from qlora_core.config.load import parse_section
    from qlora_core.config.yaml_text import parse_value

    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        ours, dot, setting = key.strip().partition(".")
        if not equals or not dot or ours != name:
            raise ConfigError(f"--set takes {name}.KEY=VALUE here, not {override!r}")
        if setting not in section.model_fields:
            raise ConfigError(f"--set {name}.{setting}: unknown; allowed: {', '.join(section.model_fields)}")
        values[setting] = parse_value(text)
    return parse_section(section, values, name)
