"""Which failures Prefect tries again."""

import asyncio
from typing import Any, cast

import pytest
from prefect.states import Failed

from qlora_core.errors import (
    ConfigError,
    DataError,
    JudgeError,
    JudgeUnavailableError,
    RegistryError,
    RegistryUnavailableError,
    StoreError,
    StoreUnavailableError,
    TrainingError,
)
from tasks.stage_run import worth_retrying

PASSING = [StoreUnavailableError, JudgeUnavailableError, RegistryUnavailableError, ConnectionError, TimeoutError]
LASTING = [ConfigError, DataError, TrainingError, StoreError, JudgeError, RegistryError, ValueError]


@pytest.mark.parametrize(("kind", "again"), [*((kind, True) for kind in PASSING), *((kind, False) for kind in LASTING)])
def test_outages_are_tried_again_and_lasting_faults_are_not(kind: type[Exception], again: bool) -> None:
    state = Failed(data=kind("said by the test"))
    nothing = cast(Any, None)
    assert asyncio.run(worth_retrying(nothing, nothing, state)) is again
