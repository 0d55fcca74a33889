"""One mover of aliases at a time, in processes of their own, and nobody waits for the dead."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qlora_core.config.load import load_config
from qlora_core.config.pipeline import PipelineConfig
from qlora_core.errors import RegistryError
from qlora_core.pipeline.champion_lease import champion_lease

HOLD = """
import sys, time
from pathlib import Path
from qlora_core.config.load import load_config
from qlora_core.pipeline.champion_lease import champion_lease
with champion_lease(load_config(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    (tmp_path / "pipeline.yaml").write_text("data: {sources: [x.json]}\nbase: {model: demo}\n")
    return load_config(tmp_path / "pipeline.yaml")


def test_two_threads_take_turns(config: PipelineConfig) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(5):
            with champion_lease(config, timeout_s=30):
                inside += 1
                most = max(most, inside)
                time.sleep(0.005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_living_holder_is_named_and_a_killed_one_loses_it_at_once(config: PipelineConfig) -> None:
    command = [sys.executable, "-c", HOLD, str(config.folder / "pipeline.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RegistryError, match="held the aliases of 'assistant'"),
            champion_lease(config, timeout_s=0.3),
        ):
            raise AssertionError("two hold it")
        # Another model of the same registry is another matter.
        other = config.model_copy(update={"registry": config.registry.model_copy(update={"model_name": "other"})})
        with champion_lease(other.rooted_at(config.folder), timeout_s=0.3):
            pass
        holder.kill()
        holder.wait()
    started = time.monotonic()
    with champion_lease(config, timeout_s=20):
        assert time.monotonic() - started < 10
