"""Moving a record that cannot be believed out of the way, unless a sound one has taken its place meanwhile.

It does not know what is wrong with the record. Blobs are the backend's business.
"""

import logging
import secrets

from qlora_core.errors import StoreError, StoreUnavailableError
from qlora_core.store.backend import Backend, Record
from qlora_core.store.layout import QUARANTINE, VERSION

logger = logging.getLogger(__name__)


def set_record_aside(backend: Backend, name: str, record: Record) -> bool:
    """Move the record to quarantine: it becomes a miss. False if it was changed or removed meanwhile.

    Where nothing may be written, as on a read-only disk, it stays and that is logged.
    """
    target = f"{QUARANTINE}/{name.removeprefix(f'{VERSION}/')}-{secrets.token_hex(4)}"
    try:
        if not backend.remove(name, record.tag):
            return False
        backend.create(target, record.data)
    except StoreUnavailableError:
        raise
    except StoreError as error:
        logger.warning("%s could not be moved to %s: %s", name, target, error)
    else:
        logger.info("moved %s to %s", name, target)
    return True
