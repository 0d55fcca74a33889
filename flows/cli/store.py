"""Commands on the artifact store: ls, show, verify, gc, pin, unpin, explain, lineage, export, import."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.reporting import JsonOption, Report, reporting

if TYPE_CHECKING:
    from qlora_core.store.store import Store

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_KEY_SHOWN = 12

StoreOption = Annotated[
    str | None, typer.Option("--store", metavar="URL", help="A folder or s3://bucket/prefix, instead of --config.")
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="The pipeline config whose store is meant; default: ./pipeline.yaml.")
]
KeyArgument = Annotated[
    str, typer.Argument(help="An artifact's key, or its first 6 digits or more.", metavar="KEY", show_default=False)
]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at the artifact store, keep it small, carry artifacts elsewhere.\n\n"
    "Examples:\n\n  qlora store ls\n\n  qlora store gc --keep-last 5 --older-than 7d --dry-run",
)


def open_store_of(url: str | None, config: Path | None, *, is_new: bool = False) -> "Store":
    """The store that a command is about: at `url`, or that of a config file."""
    from qlora_core.config.load import load_config
    from qlora_core.errors import ConfigError
    from qlora_core.pipeline.job import Job
    from qlora_core.store.store import open_store

    default = Path("pipeline.yaml")
    if url is not None and config is not None:
        raise ConfigError("--store and --config both say which store is meant; give one of them")
    if url is None and config is None and not default.is_file():
        raise ConfigError(
            f"which store? There is no {default} in {Path.cwd()}: give --store with a folder or s3://bucket/prefix, or "
            "--config with a pipeline config"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora"
    store = Job(load_config(config or default)).store if url is None else open_store(url, cache)
    if not is_new and not store.location.startswith("s3://") and not (Path(store.location) / "v1").is_dir():
        raise ConfigError(f"there is no store in {store.location} yet; a run of the pipeline makes it")
    return store


@app.command("ls")
def list_store(
    stage: Annotated[str | None, typer.Option(help="Only this stage's.")] = None,
    url: StoreOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """The artifacts, newest first, and what keeps each from being collected.

    Example:

      qlora store ls --stage sweep
    """
    with reporting(json) as report:
        from qlora_core.store.inventory import list_artifacts

        store = open_store_of(url, config)
        rows, faults = list_artifacts(store)
        rows = [row for row in rows if stage in (None, row["stage"])]
        report.data = {"store": store.location, "artifacts": rows, "corrupt": faults}
        for row in rows:
            kept = f"  kept by {', '.join(row['kept_by'])}" if row["kept_by"] else ""
            report.say(f"{_title(row):<34} {_when(row)} {_size(row['size_bytes']):>9} {row['files']:>4} files{kept}")
        for fault in faults.values():
            report.say(f"corrupt: {fault}")
        report.say(f"{len(rows)} artifacts in {store.location}")


@app.command()
def show(key: KeyArgument, url: StoreOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    """One artifact: its files, settings and inputs, what keeps it, and what was made from it.

    Example:

      qlora store show 3f2a9c
    """
    with reporting(json) as report:
        from qlora_core.store.catalog import find_address
        from qlora_core.store.inventory import show_artifact

        store = open_store_of(url, config)
        shown = show_artifact(store, find_address(store.backend, key))
        report.data = shown
        report.say(f"{shown['stage']} {shown['key']}, version {shown['version']}")
        made = f"{_when(shown)} by process {shown['producer']['pid']} on {shown['producer']['host']}"
        report.say(f"made {made}; {_size(shown['size_bytes'])}; digest {shown['digest']}")
        _say_table(report, "files", {path: _size(file["size_bytes"]) for path, file in shown["files"].items()})
        _say_table(report, "inputs", shown["inputs"])
        _say_table(report, "config", shown["config"])
        report.say(f"kept by: {', '.join(shown['kept_by']) or 'nothing'}")
        report.say(f"used by: {', '.join(shown['used_by']) or 'nothing'}")


@app.command()
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Move what is broken to quarantine.")] = False,
    url: StoreOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Read everything at the place itself and name each blob that is corrupt or missing. Exit code 1 if there is one.

    Example:

      qlora store verify --repair
    """
    with reporting(json) as report:
        from qlora_core.store.verification import verify as verify_store

        store = open_store_of(url, config)
        found = verify_store(store, repair=repair)
        report.data = found.to_json()
        for blob in found.broken:
            report.say(blob.fault)
            for manifest, path in blob.files:
                report.say(f"  breaks {path} of {manifest.stage} {manifest.key[:_KEY_SHOWN]}")
        for fault in found.manifests.values():
            report.say(fault)
        report.say(f"read {found.artifacts} artifacts, {found.blobs} blobs, {_size(found.size_bytes)}")
        report.say(f"{found.orphans} blobs, {_size(found.orphan_bytes)}, belong to no artifact")
        if not found.ok and repair:
            report.say("what is broken was moved to quarantine: the next run builds it anew")
        elif not found.ok:
            report.say(
                "broken; `qlora store verify --repair` moves it to quarantine, so that the next run builds it anew"
            )
        report.exit_code = 0 if found.ok else 1


@app.command()
def gc(
    keep_last: Annotated[int, typer.Option(min=0, help="Newest artifacts of each stage to keep.")] = 5,
    older_than: Annotated[str, typer.Option(metavar="TIME", help="Keep what is younger: 30m, 12h, 7d.")] = "7d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    url: StoreOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Remove what nothing keeps: no pin, model version, running stage or unfinished sweep, and not its age.

    Whatever a kept artifact was made from is kept too. Runs may go on meanwhile. It may be interrupted at any time;
    the next one finishes.

    Examples:

      qlora store gc --dry-run

      qlora store gc --keep-last 5 --older-than 7d --store s3://bucket/prefix
    """
    with reporting(json) as report:
        from qlora_core.store.gc import collect

        older_than_s = duration_s(older_than)
        store = open_store_of(url, config)
        done = collect(store, keep_last=keep_last, older_than_s=older_than_s, dry_run=dry_run)
        report.data = done.to_json()
        for row in done.artifacts:
            report.say(f"{_title(row):<34} {_when(row)} {_size(row['size_bytes']):>9}")
        does = "would remove" if dry_run else "removed"
        report.say(f"{does} {len(done.artifacts)} artifacts and {done.blobs} blobs: {_size(done.freed_bytes)}")
        others = {"folders of links": done.views, "pieces of work": done.work, "leases": done.leases}
        told = [f"{count} {what}" for what, count in {**others, "leftovers": done.leftovers}.items() if count]
        if told:
            report.say(f"{does} {', '.join(told)}")
        report.say(f"kept {done.kept} artifacts, and {done.young_blobs} blobs that are young and nobody's yet")


@app.command()
def pin(
    keys: Annotated[list[str], typer.Argument(help="Keys, or their first digits.", metavar="KEY...")],
    name: Annotated[str, typer.Option("--name", help="What the pin is called.", show_default=False)],
    note: Annotated[str, typer.Option("--note", help="Why; kept with it.")] = "",
    url: StoreOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Keep artifacts, and all that they were made from, until they are unpinned.

    Example:

      qlora store pin 3f2a9c --name audit-2026 --note "what the report of May quotes"
    """
    with reporting(json) as report:
        from qlora_core.store.catalog import find_address
        from qlora_core.store.refs import add_pin

        store = open_store_of(url, config)
        pinned = add_pin(store.backend, name, [find_address(store.backend, key) for key in keys], note)
        report.data = pinned.model_dump(mode="json")
        report.say(f"pin {name} keeps {', '.join(pinned.addresses)}")


@app.command()
def unpin(
    name: Annotated[str, typer.Argument(help="What the pin is called.", show_default=False)],
    url: StoreOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Take a pin away. What it kept stays until the next collection.

    Example:

      qlora store unpin audit-2026
    """
    with reporting(json) as report:
        from qlora_core.store.refs import remove_pin

        remove_pin(open_store_of(url, config).backend, name)
        report.data = {"name": name}
        report.say(f"took pin {name} away")


@app.command()
def explain(
    key: KeyArgument,
    against: Annotated[
        str | None, typer.Option(metavar="KEY", help="What to compare with; default: the one before it.")
    ] = None,
    url: StoreOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Why an artifact was built and not taken from the store: what differs from the last one of its stage.

    Examples:

      qlora store explain 3f2a9c

      qlora store explain 3f2a9c --against 91bc04 --json
    """
    with reporting(json) as report:
        from qlora_core.store.catalog import find_address
        from qlora_core.store.explain import explain as explain_key
        from qlora_core.store.explain import explain_lines

        store = open_store_of(url, config)
        other = find_address(store.backend, against) if against else None
        report.data = explain_key(store, find_address(store.backend, key), other)
        for line in explain_lines(report.data):
            report.say(line)


@app.command()
def lineage(
    key: Annotated[str | None, typer.Argument(help="An artifact's key; default: all of them.", metavar="KEY")] = None,
    url: StoreOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """What an artifact was made from, back to what came from outside the store.

    Example:

      qlora store lineage 3f2a9c --json
    """
    with reporting(json) as report:
        from qlora_core.store.catalog import find_address
        from qlora_core.store.lineage import lineage_of, lineage_of_all

        store = open_store_of(url, config)
        graph = lineage_of(store, find_address(store.backend, key)) if key else lineage_of_all(store)
        report.data = graph
        names = {node["id"]: _title(node) if node["kind"] == "artifact" else node["name"] for node in graph["nodes"]}
        for node in graph["nodes"]:
            made_here = node["kind"] == "artifact"
            report.say(
                f"{_title(node)}, {_when(node)}" if made_here else f"{node['name']} {node['digest'][:_KEY_SHOWN]}"
            )
            for edge in graph["edges"]:
                if edge["to"] == node["id"]:
                    report.say(f"    {edge['name']} <- {names[edge['from']]}")


@app.command("export")
def export_tar(
    key: KeyArgument,
    file: Annotated[Path, typer.Argument(help="The tar file to write.", show_default=False)],
    with_inputs: Annotated[bool, typer.Option("--with-inputs", help="And all that it was made from.")] = False,
    url: StoreOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Write an artifact to one file, to be imported elsewhere. The same artifact gives the same bytes.

    Example:

      qlora store export 3f2a9c adapter.tar --with-inputs
    """
    with reporting(json) as report:
        from qlora_core.store.catalog import find_address
        from qlora_core.store.exchange import export_artifacts

        store = open_store_of(url, config)
        done = export_artifacts(store, find_address(store.backend, key), file, with_inputs=with_inputs)
        report.data = done
        report.say(f"wrote {len(done['artifacts'])} artifacts, {_size(done['size_bytes'])}, to {file}")


@app.command("import")
def import_tar(
    file: Annotated[Path, typer.Argument(help="A file that export wrote.", show_default=False)],
    url: StoreOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Publish the artifacts in a file, after verifying all of it; what is there already is skipped.

    Example:

      qlora store import adapter.tar --store s3://other/bucket
    """
    with reporting(json) as report:
        from qlora_core.store.exchange import import_artifacts

        store = open_store_of(url, config, is_new=True)
        done = import_artifacts(store, file)
        report.data = done
        for name in done["imported"]:
            report.say(f"imported {name}")
        for name in done["skipped"]:
            report.say(f"{name} is there already")


def duration_s(text: str) -> float:
    """Seconds in "30m", "12h", "7d" or "0s". Raises ConfigError for anything else."""
    from qlora_core.errors import ConfigError

    told = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if told is None:
        raise ConfigError(f"{text!r} is no length of time: a number and s, m, h, d or w, such as 30m, 12h, 7d or 0s")
    return float(told[1]) * _SECONDS[told[2]]


def _say_table(report: Report, title: str, cells: dict[str, Any]) -> None:
    report.say(f"{title}:" if cells else f"{title}: none")
    for name, value in cells.items():
        report.say(f"  {name}: {value}")


def _title(row: dict[str, Any]) -> str:
    return f"{row['stage']} {row['key'][:_KEY_SHOWN]}"


def _when(row: dict[str, Any]) -> str:
    return str(row["created"])[:16].replace("T", " ")


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} GB"
