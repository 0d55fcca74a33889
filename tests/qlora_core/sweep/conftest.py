"""One local Ray for all tests of the sweep, and the toy sweep as a module that its workers can unpickle."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from qlora_core.sweep.cluster import ray_connection

TOY = Path(__file__).with_name("toy_sweep.py")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    with ray_connection(None, 2):
        yield


@pytest.fixture(scope="session")
def toy(local_ray: None) -> Iterator[ModuleType]:
    import ray.cloudpickle

    spec = importlib.util.spec_from_file_location("toy_sweep", TOY)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {TOY}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_sweep"] = module
    spec.loader.exec_module(module)
    # Worker processes do not have tests on their path: the class travels with the call.
    ray.cloudpickle.register_pickle_by_value(module)
    yield module
    del sys.modules["toy_sweep"]
