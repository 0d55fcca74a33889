"""Commands on what keeps artifacts: pin, unpin, refs, unref."""

import re
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.reporting import JsonOption, reporting
from flows.cli.store_arguments import ConfigOption, EncryptionOption, KmsKeyOption, StoreOption, open_store_of

if TYPE_CHECKING:
    from qlora_core.store.backend import Backend
    from qlora_core.store.refs import Ref

_DIGITS_SHOWN = 12
_FEWEST_DIGITS = 6
_LONG_KEY = re.compile(r"\b[0-9a-f]{64}\b")


def pin(
    keys: Annotated[list[str], typer.Argument(help="Keys, or their first digits.", metavar="KEY...")],
    name: Annotated[str, typer.Option("--name", help="What the pin is called.", show_default=False)],
    note: Annotated[str, typer.Option("--note", help="Why; kept with it.")] = "",
    url: StoreOption = None,
    config: ConfigOption = None,
    encryption: EncryptionOption = None,
    kms_key_id: KmsKeyOption = None,
    json: JsonOption = False,
) -> None:
    """Keep artifacts, and all that they were made from, until they are unpinned.

    Example:

      qlora store pin 3f2a9c --name audit-2026 --note "what the report of May quotes"
    """
    with reporting(json) as report:
        from qlora_core.store.catalog import find_address
        from qlora_core.store.refs import add_pin

        store = open_store_of(url, config, encryption=encryption, kms_key_id=kms_key_id)
        pinned = add_pin(store.backend, name, [find_address(store.backend, key) for key in keys], note)
        report.data = pinned.model_dump(mode="json")
        report.say(f"pin {name} keeps {', '.join(pinned.addresses)}")


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


def refs(url: StoreOption = None, config: ConfigOption = None, json: JsonOption = False) -> None:
    """What keeps artifacts by name: the pins of people, and the references of registered model versions.

    Example:

      qlora store refs
    """
    with reporting(json) as report:
        from qlora_core.store.refs import list_refs, remedy

        store = open_store_of(url, config)
        faults: dict[str, str] = {}
        found = sorted(list_refs(store.backend, faults), key=lambda ref: ref.created, reverse=True)
        listed = [ref.model_dump(mode="json") for ref in found]
        report.data = {"store": store.location, "refs": listed, "corrupt": faults}
        for ref in found:
            note = f"  {ref.note}" if ref.note else ""
            report.say(f"{ref.kind} {shortened(ref.name)}  {ref.created:%Y-%m-%d %H:%M}{note}")
            for address in ref.addresses:
                report.say(f"    keeps {shortened(address.partition('/stage/')[2])}")
        for record_name, fault in faults.items():
            report.say(f"corrupt: {fault}; {remedy(record_name)}")
        report.say(f"{len(found)} pins and references in {store.location}")


def unref(
    name: Annotated[
        str, typer.Argument(help="As `refs` and `ls` show it: MODEL/RUN, the run by 6 digits or more.", metavar="NAME")
    ],
    kind: Annotated[str | None, typer.Option(help="Its kind, where two kinds have one of that name.")] = None,
    url: StoreOption = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Take a model version's reference away, once that version is not needed any more.

    What it kept stays until the next collection. In the registry nothing changes.

    Example:

      qlora store unref assistant/3f2a9c
    """
    with reporting(json) as report:
        from qlora_core.store.refs import remove_ref

        backend = open_store_of(url, config).backend
        found = _find_ref(backend, name, kind)
        remove_ref(backend, found.kind, found.name)
        report.data = {"name": found.name, "kind": found.kind, "addresses": list(found.addresses)}
        report.say(f"took {found.kind} {found.name} away, which kept {len(found.addresses)} artifacts")


def shortened(text: str) -> str:
    """A text for people, with the first digits of each key in it."""
    return _LONG_KEY.sub(lambda key: key[0][:_DIGITS_SHOWN], text)


def _find_ref(backend: "Backend", name: str, kind: str | None) -> "Ref":
    """The reference of that name; where a name ends in a key, some first digits of it will do."""
    from qlora_core.errors import ConfigError
    from qlora_core.store.refs import PIN, list_refs

    there = list_refs(backend, {})
    refs = [ref for ref in there if ref.kind != PIN and kind in (None, ref.kind)]
    found = [ref for ref in refs if ref.name == name] or [ref for ref in refs if _is_start(name, ref.name)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{ref.kind} {ref.name}" for ref in found)
        raise ConfigError(f"{name!r} means {len(found)} references: {names}; give more digits, or --kind")
    if any(ref.kind == PIN and ref.name == name for ref in there):
        raise ConfigError(f"{name!r} is a pin; `qlora store unpin {name}` takes it away")
    names = ", ".join(sorted(shortened(ref.name) for ref in refs))
    raise ConfigError(f"no reference {name!r} in {backend.location}; there are: {names or 'none'}")


def _is_start(text: str, name: str) -> bool:
    before, _, key = name.rpartition("/")
    of, _, digits = text.rpartition("/")
    is_key = _LONG_KEY.fullmatch(key) is not None and len(digits) >= _FEWEST_DIGITS
    return is_key and of == before and key.startswith(digits)
