"""A quantization that is killed for real goes on at its last finished shard, and believes only what it has checked."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.demo.tokenizer import train_tokenizer
from qlora_core.errors import ConfigError
from qlora_core.quantization.publish import quantize_folder
from qlora_core.quantization.quantize import quantize_checkpoint
from qlora_core.quantization.resume import discard_work, open_work

CONFIG = QuantizeConfig(max_shard_bytes=1_000_000)
FINISHED = 2

# The command's own door; the process stops, and says so, when it has finished two shards.
PROGRAM = f"""
import sys, time
from pathlib import Path
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.quantization.publish import quantize_folder
from qlora_core.quantization.resume import WorkFolder

keep = WorkFolder.keep
finished = []
def keep_and_stop(self, record):
    keep(self, record)
    finished.append(record)
    if len(finished) == {FINISHED}:
        print("stopped", flush=True)
        time.sleep(600)
WorkFolder.keep = keep_and_stop
quantize_folder(Path(sys.argv[1]), Path(sys.argv[2]), QuantizeConfig(max_shard_bytes=1_000_000))
"""


@dataclass(frozen=True)
class Killed:
    """A source, and a target that a killed run has not made."""

    source: Path
    target: Path

    @property
    def work(self) -> Path:
        (work,) = self.target.parent.glob(f".{self.target.name}-*")
        return work

    @property
    def shards(self) -> list[Path]:
        return sorted((self.work / "files").glob("model-*.safetensors"))

    def again(self) -> dict[str, object]:
        return quantize_folder(self.source, self.target, CONFIG)


@contextmanager
def stopped_run(source: Path, target: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", PROGRAM, str(source), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "stopped"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Made once: killed with SIGKILL after two of its shards, while another process tried the same and was refused."""
    folder = tmp_path_factory.mktemp("killed")
    source, target = folder / "base", folder / "out"
    config = LlamaConfig(
        vocab_size=320, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(source)
    train_tokenizer(["a few words"], vocab_size=300, max_tokens=512).save_pretrained(str(source))
    made = Killed(source, target)
    with stopped_run(source, target) as process:
        with pytest.raises(ConfigError, match="another process is quantizing"):
            made.again()
        discard_work(made.work)  # of a living process: left alone
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    return made


@pytest.fixture
def killed(killed_once: Killed, tmp_path: Path) -> Killed:
    """A copy of it, as it was left."""
    shutil.copytree(killed_once.target.parent, tmp_path / "copy")
    return Killed(tmp_path / "copy" / "base", tmp_path / "copy" / "out")


@pytest.fixture(scope="module")
def straight(killed_once: Killed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, made in one go."""
    target = tmp_path_factory.mktemp("straight") / "out"
    assert quantize_folder(killed_once.source, target, CONFIG)["resumed_shards"] == 0
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "quantization.json"}


def test_killed_run_left_finished_and_unfinished_shards_and_no_target(killed_once: Killed, straight: Path) -> None:
    """Negative control of the fault itself."""
    assert len(killed_once.shards) == FINISHED < len(list(straight.glob("model-*.safetensors")))
    assert not killed_once.target.exists()
    assert (killed_once.work / "plan.json").is_file()


def test_next_run_goes_on_at_the_last_finished_shard(killed: Killed, straight: Path) -> None:
    before = {path.name: path.stat().st_ino for path in killed.shards}
    report = killed.again()
    assert report["resumed_shards"] == FINISHED
    assert {name: (killed.target / name).stat().st_ino for name in before} == before
    assert contents(killed.target) == contents(straight)
    assert not list(killed.target.parent.glob(".out-*"))


def test_report_of_a_resumed_run_covers_the_shards_it_did_not_make(killed: Killed, tmp_path: Path) -> None:
    report, other = killed.again(), quantize_folder(killed.source, tmp_path / "whole", CONFIG)
    differs = {"seconds", "peak_rss_bytes", "resumed_shards"}
    assert {key: report[key] for key in report.keys() - differs} == {key: other[key] for key in other.keys() - differs}
    assert len(other["layers"]) == 14


def test_finished_shard_that_was_damaged_since_is_made_again(killed: Killed, straight: Path) -> None:
    content = bytearray(killed.shards[0].read_bytes())
    content[len(content) // 2] ^= 4
    killed.shards[0].write_bytes(content)
    assert killed.again()["resumed_shards"] == FINISHED - 1
    assert contents(killed.target) == contents(straight)


def test_weights_that_changed_since_are_noticed(killed: Killed, straight: Path) -> None:
    """The same names, shapes, sizes and times of change: only values differ."""
    path = killed.source / "model.safetensors"
    stat = path.stat()
    weights = load_file(path)
    for name, value in weights.items():
        weights[name] = value * 0.5
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    work = killed.work
    assert killed.again()["resumed_shards"] == 0
    assert not work.exists()  # it was this folder that was found, and not believed
    assert contents(killed.target) != contents(straight)
    quantize_folder(killed.source, killed.target.with_name("whole"), CONFIG)
    assert contents(killed.target) == contents(killed.target.with_name("whole"))


def test_other_settings_leave_unfinished_work_alone(killed: Killed) -> None:
    work = killed.work
    other = CONFIG.model_copy(update={"blocksize": 128})
    assert quantize_folder(killed.source, killed.target, other)["resumed_shards"] == 0
    assert len(list((work / "files").glob("model-*.safetensors"))) == FINISHED


def test_stage_receives_what_a_work_folder_elsewhere_holds(killed: Killed, straight: Path, tmp_path: Path) -> None:
    """As the pipeline calls it: an empty folder of the store, and a work folder that outlives the process."""
    (tmp_path / "stage").mkdir()
    report = quantize_checkpoint(killed.source, tmp_path / "stage", CONFIG, work=killed.work)
    assert report["resumed_shards"] == FINISHED
    assert contents(tmp_path / "stage") == contents(straight)


def test_unfinished_work_goes_when_the_source_turns_out_unusable(killed: Killed) -> None:
    path = killed.source / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        killed.again()
    assert not list(killed.target.parent.glob(".out-*"))


def test_damaged_plan_or_record_starts_anew(tmp_path: Path) -> None:
    plan = {"source": {"a": "1"}}
    for damage in ("{", '{"source": {}}'):
        with open_work(tmp_path / "work", plan) as work:
            (work.files / "model.safetensors").write_bytes(b"x")
        (tmp_path / "work" / "plan.json").write_text(damage)
        with open_work(tmp_path / "work", plan) as work:
            assert not list(work.files.iterdir())
    with open_work(tmp_path / "work", plan) as work:
        (work.folder / "model.safetensors.json").write_text('{"file": 1}')
        assert work.finished("model.safetensors", lambda: "") is None
    discard_work(tmp_path / "work")
    assert not (tmp_path / "work").exists()
