"""Commands that answer with adapters: an OpenAI-compatible endpoint, and a chat in the terminal."""

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.addresses import adapter_cache, base_in_store, is_address, registry_config
from flows.cli.reporting import JsonOption, reporting
from qlora_core.errors import ConfigError

if TYPE_CHECKING:
    from qlora_core.serving.admission import AdapterSource
    from qlora_core.serving.following import Following
    from qlora_core.serving.served import Served
    from qlora_core.serving.server import ModelServer


class Precision(StrEnum):
    """What the base computes in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=FOLDER",
        help="A PEFT folder, or models:/NAME@ALIAS, and the name to ask for it by; repeat for more.",
    ),
]
RegistryOption = Annotated[
    Path | None,
    typer.Option(
        help="A pipeline.yaml: its registry resolves models:/; without any, its champion and challenger are served.",
        show_default=False,
    ),
]
PrecisionOption = Annotated[Precision, typer.Option(help="What the base computes in.")]
UnboundOption = Annotated[
    bool, typer.Option("--allow-unbound", help="Take adapters that cannot show that they are of this base.")
]


def serve(
    base: Annotated[
        Path | None,
        typer.Argument(
            help="The base: a checkpoint folder, 4-bit or not; default: from --registry's store, the one that the "
            "registered adapters were trained on.",
            show_default=False,
        ),
    ] = None,
    adapter: AdapterOption = None,
    registry: RegistryOption = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the base itself; default: its folder's, or base without BASE.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback needs QLORA_SERVE_TOKEN.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    rows: Annotated[int, typer.Option(min=1, help="Answers in one batch.")] = 16,
    waiting: Annotated[int, typer.Option(min=1, help="Requests that wait before others are turned away.")] = 64,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Longest request.")] = 1 << 20,
    precision: PrecisionOption = Precision.AUTO,
    follow_every: Annotated[
        float, typer.Option(min=0, help="Seconds after which aliases are looked up again; 0: only at the start.")
    ] = 5.0,
    allow_unbound: UnboundOption = False,
    json: JsonOption = False,
) -> None:
    """Answer over an OpenAI-compatible endpoint, each request with the adapter it names, until interrupted.

    A name that follows an alias answers with the alias's new version within seconds of a promotion.

    Examples:

      qlora serve models/base-nf4 --adapter support=out/support --adapter legal=out/legal

      qlora serve --registry pipeline.yaml
    """
    with ExitStack() as opened:
        with reporting(json) as report:
            from qlora_core.serving.server import Limits, check_access, open_model_server

            check_access(host, os.environ)
            sources, following = _sources(adapter or (), registry, follow_every)
            if base is None:
                base, name = _stored_base(sources, registry), name or "base"
            served = opened.enter_context(_served(base, sources, name, precision, allow_unbound))
            limits = Limits(rows, waiting, max_body_bytes)
            server = open_model_server(
                served, host=host, port=port, environment=os.environ, limits=limits, following=following
            )
            report.data = {"url": server.url, "models": list(served.models), "needs_token": server.needs_token}
            report.say(f"{server.url} answers for {', '.join(served.models)}; stop with Ctrl-C")
        try:
            server.run()
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)


def chat(
    base: Annotated[
        Path | None, typer.Option(help="Answer in this process with this base; default: ask the server at --url.")
    ] = None,
    adapter: AdapterOption = None,
    registry: RegistryOption = None,
    url: Annotated[str, typer.Option(help="A running server; its token is read from QLORA_SERVE_TOKEN.")] = (
        "http://127.0.0.1:8000/v1"
    ),
    model: Annotated[
        list[str] | None, typer.Option(help="Whom to talk to; give two to see them side by side.", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the most probable word.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    precision: PrecisionOption = Precision.AUTO,
    allow_unbound: UnboundOption = False,
    json: JsonOption = False,
) -> None:
    """Talk to a base and its adapters in the terminal, to one or to two side by side. /help tells the commands.

    With --json the conversation is shown on standard error, and the result holds what was said.

    Examples:

      qlora chat --url http://127.0.0.1:8000/v1 --model champion --model challenger

      qlora chat --base models/base-nf4 --adapter support=out/support
    """
    with reporting(json) as report, ExitStack() as opened:
        from rich.console import Console

        from qlora_core.serving.client import ChatClient
        from qlora_core.serving.terminal import Conversation

        if len(model or ()) > 2:
            raise ConfigError(f"--model was given {len(model or ())} times; one model or two can be talked to at once")
        if base is None and (adapter or registry):
            raise ConfigError("--adapter and --registry go with --base; a running server has its own")
        if base is not None:
            sources, _ = _sources(adapter or (), registry, 0)
            served = opened.enter_context(_served(base, sources, None, precision, allow_unbound))
            url = opened.enter_context(_in_this_process(served)).url
        client = ChatClient(url, os.environ.get("QLORA_SERVE_TOKEN") or None)
        settings: Mapping[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        console = Console()
        talk = Conversation(client, console, model or (), settings)
        if sys.stdin.isatty():
            console.print(f"talking to {' and '.join(talk.current)}; /help tells the commands", style="dim")
        talk.run(_lines())
        report.data = {"models": list(talk.current), "histories": talk.histories}


@contextmanager
def _served(
    base: Path, sources: "Sequence[AdapterSource]", name: str | None, precision: Precision, unbound: bool
) -> "Iterator[Served]":
    from qlora_core.serving.served import open_served

    with open_served(base, sources, base_name=name, precision=precision.value, allow_unbound=unbound) as served:
        yield served


def _sources(
    adapters: Sequence[str], registry: Path | None, every_s: float
) -> "tuple[list[AdapterSource], Following | None]":
    """The adapters of `--adapter`, addresses resolved; those of the registry where none of its own is named.

    And the names whose alias is to be followed; None where there is none, or `every_s` is 0.
    """
    from qlora_core.serving.admission import AdapterSource

    named = [_named(adapter) for adapter in adapters]
    for place, (name, _) in enumerate(named):
        if name in [before for before, _ in named[:place]]:
            raise ConfigError(f"--adapter names {name!r} twice; a request could not say which it means: rename one")
    wanted = {name: where for name, where in named if is_address(where)}
    sources = [AdapterSource(name, Path(where)) for name, where in named if not is_address(where)]
    if not wanted and registry is None:
        return sources, None
    resolved, following = _resolved(next(iter(wanted.values()), ""), registry, wanted, every_s)
    order = {name: place for place, (name, _) in enumerate(named)}
    return sorted([*sources, *resolved], key=lambda source: order.get(source.name, len(order))), following


def _named(adapter: str) -> tuple[str, str]:
    """Name and place; an address alone is its own name."""
    name, equals, where = adapter.partition("=")
    if not equals and is_address(adapter):
        return adapter, adapter
    if not name or not where:
        raise ConfigError(f"--adapter takes NAME=FOLDER, NAME=models:/M@ALIAS or models:/M@ALIAS, not {adapter!r}")
    return name, where


def _resolved(
    first: str, registry: Path | None, wanted: Mapping[str, str], every_s: float
) -> "tuple[list[AdapterSource], Following | None]":
    """The versions that addresses mean now, by name; without any, those of the champion and the challenger."""
    from qlora_core.registry.model_address import (
        AddressBook,
        alias_addresses,
        is_alias,
        present_aliases,
        resolve_address,
    )
    from qlora_core.serving.admission import AdapterSource
    from qlora_core.serving.following import Following

    config = registry_config(first, registry)
    uri, cache, model_name = config.tracking_uri, adapter_cache(config), config.registry.model_name
    present = wanted or {each: each for each in present_aliases(uri, model_name)}
    sources = []
    for name, address in present.items():
        one = resolve_address(uri, address, cache)
        sources.append(AdapterSource(name, one.folder, address, one.version, one.quantized_base_digest))
    follow = {name: each for name, each in wanted.items() if is_alias(each)}
    follow = follow if wanted else {each: each for each in alias_addresses(model_name)}
    return sources, Following(AddressBook(uri, cache), follow, every_s) if follow and every_s > 0 else None


def _stored_base(sources: "Sequence[AdapterSource]", registry: Path | None) -> Path:
    """The base in the config's store that every registered adapter among the sources was trained on."""
    known = {source.base_digest: source for source in sources if source.base_digest is not None}
    if registry is None or not known:
        raise ConfigError(
            "no BASE is given, and no registered adapter that tells it; give the base's folder, or --registry CONFIG "
            "to serve its champion and challenger"
        )
    if len(known) > 1:
        told = "; ".join(f"{each.name} (version {each.version}) on {digest}" for digest, each in known.items())
        raise ConfigError(
            f"no BASE is given, and the adapters were trained on {len(known)} bases: {told}; serve those of one base, "
            "each with --adapter"
        )
    digest, source = known.popitem()
    of = f"version {source.version}, {source.address},"
    return base_in_store(registry_config("BASE", registry), digest, of=of, option="BASE")


@contextmanager
def _in_this_process(served: "Served") -> "Iterator[ModelServer]":
    """A server on a free port of loopback, in a thread, while the block runs."""
    from qlora_core.serving.server import open_model_server

    server = open_model_server(served, host="127.0.0.1", port=0, environment=os.environ)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def _lines() -> Iterator[str]:
    """What is typed, or piped in; Ctrl-C at the prompt ends it."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            return
