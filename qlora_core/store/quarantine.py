"""Moving a record that cannot be believed out of the way, unless a sound one has taken its place meanwhile.

It does not know what is wrong with the record. Blobs are the backend's business.
"""

import logging
import secrets

from qlora_core.store.backend import Backend, Record
from qlora_core.store.layout import QUARANTINE, VERSION

logger = logging.getLogger(__name__)


def set_record_aside(backend: Backend, name: str, record: Record) -> bool:
    """Move the record to quarantine: it becomes a miss. False if it was changed or removed meanwhile."""
    target = f"{QUARANTINE}/{name.removeprefix(f'{VERSION}/')}-{secrets.token_hex(4)}"
    if not backend.remove(name, record.tag):
        return False
    backend.create(target, record.data)
    logger.info("moved %s to %s", name, target)
    return True
