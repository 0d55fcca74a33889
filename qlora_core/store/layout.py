"""Names of everything in a store, the same in a folder and in a bucket.

v1/blob/<aa>/<sha256>                     files by content, immutable, shared by all artifacts
v1/stage/<stage>/<key>/manifest.json      an artifact: its presence is the artifact, and it is written last
v1/lease/<purpose>.json                   who builds what at the moment
v1/pin/<name>.json                        artifacts that a person keeps
v1/ref/<kind>/<name>.json                 artifacts that something else refers to: a registered model version
v1/work/<name>/snapshot.json, .../blob/   work in progress: the newest checkpoint of a trial, in blobs of its own
v1/verdict/<aa>/<sha256>.json             a judge's verdict, by what was asked
v1/tags/<fingerprint>/<sha256>.parquet    what a tagger measured on rows, immutable segments by their own digest
v1/quarantine/<name>-<random>             what failed verification
"""

import re

VERSION = "v1"
BLOBS = "v1/blob"
STAGES = "v1/stage"
LEASES = "v1/lease"
PINS = "v1/pin"
REFS = "v1/ref"
WORK = "v1/work"
VERDICTS = "v1/verdict"
TAGS = "v1/tags"
QUARANTINE = "v1/quarantine"
MANIFEST_FILE = "manifest.json"


def blob_name(sha256: str, area: str = BLOBS) -> str:
    """The name of a blob in an area."""
    return f"{area}/{sha256[:2]}/{sha256}"


def is_blob_name(name: str) -> bool:
    """Whether a name is exactly that of a blob, in the shared area or in one of work in progress."""
    return re.fullmatch(rf"(?:{BLOBS}|{WORK}/.+/blob)/([0-9a-f]{{2}})/\1[0-9a-f]{{62}}", name) is not None


def address_of(stage: str, key: str) -> str:
    """The folder of an artifact's manifest."""
    return f"{STAGES}/{stage}/{key}"


def manifest_name(address: str) -> str:
    """The record that is the artifact at `address`."""
    return f"{address}/{MANIFEST_FILE}"
