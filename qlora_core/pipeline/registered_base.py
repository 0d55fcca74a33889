"""The quantized base that a registered adapter was trained on, found in a store by its digest.

Reads manifests, and verifies the one artifact that it hands out. It builds nothing and knows no registry.
"""

import logging
from pathlib import Path

from qlora_core.errors import CorruptArtifactError, StoreError
from qlora_core.store.catalog import list_addresses
from qlora_core.store.store import Store

logger = logging.getLogger(__name__)

_STAGE = "quantize"


def stored_base(store: Store, digest: str, *, of: str, option: str) -> Path:
    """The folder of the quantized base with that digest (64 hex digits), each file verified.

    Raises StoreError where the store does not hold such a base whole; it names the adapter, `of`, and the argument
    that takes a base's folder instead, `option`.
    """
    for address in sorted(list_addresses(store.backend)):
        if address.split("/")[2] == _STAGE and _digest_at(store, address) == digest:
            artifact = store.get_at(address)
            if artifact is not None:
                return artifact.path
    raise StoreError(
        f"{of} was trained on the quantized base {digest}, and the store {store.location} does not hold it; give its "
        f"folder as {option}, or make it anew: `qlora run` with the `base` and `quantize` settings of that version"
    )


def _digest_at(store: Store, address: str) -> str | None:
    try:
        manifest = store.manifest_at(address)
    except CorruptArtifactError as fault:
        logger.warning("%s: %s; it is passed over", store.location, fault)
        return None
    return manifest.digest if manifest is not None else None
