"""Moving a record that cannot be believed out of the way, unless a sound one has taken its place meanwhile.

It does not know what is wrong with the record. Blobs are the backend's business.
"""

import contextlib
import logging
import secrets
from collections.abc import Iterator

from qlora_core.errors import CorruptArtifactError, StoreError
from qlora_core.store.backend import Backend, Record
from qlora_core.store.layout import QUARANTINE, VERSION

logger = logging.getLogger(__name__)


def set_record_aside(backend: Backend, name: str, record: Record) -> bool:
    """Move the record to quarantine: it becomes a miss. False if it was changed or removed meanwhile.

    Where nothing can be written to quarantine it stays where it is, with a StoreError.
    """
    target = f"{QUARANTINE}/{name.removeprefix(f'{VERSION}/')}-{secrets.token_hex(4)}"
    # The copy first: whatever fails, the bytes are somewhere.
    if backend.create(target, record.data) is None:
        return False
    if not backend.remove(name, record.tag):
        with contextlib.suppress(StoreError):
            backend.remove(target)
        return False
    logger.info("moved %s to %s", name, target)
    return True


@contextlib.contextmanager
def noting(faults: dict[str, str] | None, name: str) -> Iterator[None]:
    """Note in `faults` under `name` what is wrong with a record read in the block; without `faults` it is raised."""
    try:
        yield
    except CorruptArtifactError as fault:
        if faults is None:
            raise
        faults[name] = str(fault)
