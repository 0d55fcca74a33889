"""Commands on the artifact store: ls, show, verify, gc, explain, lineage, export, import, and those on references."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli import store_references
from flows.cli.reporting import JsonOption, Report, reporting
from flows.cli.store_arguments import (
    ConfigOption,
    EncryptionOption,
    KeyArgument,
    KmsKeyOption,
    StoreOption,
    duration_s,
    open_store_of,
)

_KEY_SHOWN = 12

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at the artifact store, keep it small, carry artifacts elsewhere.\n\n"
    "Examples:\n\n  qlora store ls\n\n  qlora store gc --keep-last 5 --older-than 7d --dry-run",
)


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
        stages = sorted({str(row["stage"]) for row in rows})
        rows = [row for row in rows if stage in (None, row["stage"])]
        report.data = {"store": store.location, "artifacts": rows, "corrupt": faults, "stages": stages}
        for row in rows:
            kept = f"  kept by {store_references.shortened(', '.join(row['kept_by']))}" if row["kept_by"] else ""
            report.say(f"{_title(row):<34} {_when(row)} {_size(row['size_bytes']):>9} {row['files']:>4} files{kept}")
        for fault in faults.values():
            report.say(f"corrupt: {fault}")
        of = f" of stage {stage}" if stage else ""
        report.say(f"{len(rows)} artifacts{of} in {store.location}")
        if stage and not rows:
            report.say(f"the stages there are: {', '.join(stages) or 'none'}")


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
        for fault in shown["corrupt"].values():
            report.say(f"corrupt, and it may keep this too: {fault}")


@app.command()
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Move what is broken to quarantine.")] = False,
    url: StoreOption = None,
    config: ConfigOption = None,
    encryption: EncryptionOption = None,
    kms_key_id: KmsKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Read everything at the place itself and name what is corrupt or missing. Exit code 1 if there is something.

    Example:

      qlora store verify --repair
    """
    with reporting(json) as report:
        from qlora_core.store.verification import verify as verify_store

        store = open_store_of(url, config, encryption=encryption, kms_key_id=kms_key_id)
        found = verify_store(store, repair=repair)
        report.data = found.to_json()
        for blob in found.broken:
            report.say(blob.fault)
            for manifest, path in blob.files:
                report.say(f"  breaks {path} of {manifest.stage} {manifest.key[:_KEY_SHOWN]}")
        for fault in [*found.manifests.values(), *found.records.values()]:
            report.say(fault)
        for address, names in found.missing.items():
            report.say(store_references.shortened(f"{address} is not there, though {', '.join(names)} names it"))
        report.say(f"read {found.artifacts} artifacts, {found.blobs} blobs, {_size(found.size_bytes)}")
        report.say(f"{found.orphans} blobs, {_size(found.orphan_bytes)}, belong to no artifact")
        if found.set_aside:
            report.say(
                f"moved {len(found.set_aside)} things to quarantine: the next run makes anew what it needs of them"
            )
        elif not found.ok and not repair:
            report.say(
                "broken; `qlora store verify --repair` moves all but pins and references to quarantine, so that the "
                "next run makes anew what it needs"
            )
        report.exit_code = 0 if found.ok else 1


@app.command()
def gc(
    keep_last: Annotated[int, typer.Option(min=0, help="Newest artifacts of each stage to keep.")] = 5,
    older_than: Annotated[str, typer.Option(metavar="TIME", help="Keep what is younger: 30m, 12h, 7d.")] = "7d",
    drop_work_older_than: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Drop checkpoints of sweeps that were left alone for so long; default: never."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    url: StoreOption = None,
    config: ConfigOption = None,
    encryption: EncryptionOption = None,
    kms_key_id: KmsKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Remove what nothing keeps: no pin, model version, running stage or unfinished sweep, and not its age.

    Whatever a kept artifact was made from is kept too. Checkpoints of unfinished sweeps are kept whatever their age,
    unless --drop-work-older-than is given. Runs may go on meanwhile. It may be interrupted at any time; the next one
    finishes.

    Examples:

      qlora store gc --dry-run

      qlora store gc --keep-last 5 --older-than 7d --store s3://bucket/prefix

      qlora store gc --drop-work-older-than 60d
    """
    with reporting(json) as report:
        from qlora_core.store.gc import collect

        older_than_s = duration_s(older_than)
        more = {} if drop_work_older_than is None else {"drop_work_older_than_s": duration_s(drop_work_older_than)}
        store = open_store_of(url, config, encryption=encryption, kms_key_id=kms_key_id)
        done = collect(store, keep_last=keep_last, older_than_s=older_than_s, dry_run=dry_run, **more)
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


for reference_command in (store_references.pin, store_references.unpin, store_references.refs, store_references.unref):
    app.command()(reference_command)


@app.command()
def explain(
    key: KeyArgument,
    against: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="What to compare with; default: the nearest earlier one."),
    ] = None,
    url: StoreOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Why an artifact was built and not taken from the store: what differs from an earlier one of its stage.

    By default that is the one that differs least from it, the newest among equals: a shared store holds those of other
    projects too.

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
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
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
        address = find_address(store.backend, key)
        done = export_artifacts(store, address, file, with_inputs=with_inputs, force=force)
        report.data = done
        report.say(f"wrote {len(done['artifacts'])} artifacts, {_size(done['size_bytes'])}, to {file}")


@app.command("import")
def import_tar(
    file: Annotated[Path, typer.Argument(help="A file that export wrote.", show_default=False)],
    url: StoreOption = None,
    config: ConfigOption = None,
    encryption: EncryptionOption = None,
    kms_key_id: KmsKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Publish the artifacts in a file, after verifying all of it; what is there already is skipped.

    Example:

      qlora store import adapter.tar --store s3://other/bucket
    """
    with reporting(json) as report:
        from qlora_core.store.exchange import import_artifacts

        store = open_store_of(url, config, is_new=True, encryption=encryption, kms_key_id=kms_key_id)
        done = import_artifacts(store, file)
        report.data = done
        for name in done["imported"]:
            report.say(f"imported {name}")
        for name in done["skipped"]:
            report.say(f"{name} is there already")


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
