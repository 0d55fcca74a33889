"""What the steps of curation have found, handed on whole to the summary, the card and the report."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlora_core.data.decontamination.match import Decontamination
from qlora_core.data.near_duplicates.find import NearDuplicates
from qlora_core.data.placement import Placement
from qlora_core.data.reading import SourceReading
from qlora_core.data.redaction import Redactor
from qlora_core.data.remaining import Remaining
from qlora_core.data.selection.choose import Selection


@dataclass(frozen=True)
class Curated:
    """What the steps have found, for the summary, the card and the report."""

    readings: Sequence[SourceReading]
    remaining: Remaining
    placement: Placement
    sides: dict[str, np.ndarray]
    redactor: Redactor
    contamination: Decontamination
    near: NearDuplicates
    selection: Selection | None
    limit: int
