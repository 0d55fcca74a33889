"""`qlora compose`, `merge` and `adapter ...`: their JSON keys, exit codes, and what is left when they refuse."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from flows.cli.app import app
from qlora_core.adapters.adapter_folder import adapter_digest
from qlora_core.adapters.on_base import write_golden_of
from qlora_core.config.load import load_config
from qlora_core.config.quantize import QuantizeConfig
from qlora_core.digest import digest_json
from qlora_core.model.base import load_quantized
from qlora_core.pipeline.job import Job
from qlora_core.quantization.quantize import quantize_checkpoint
from qlora_core.registry.aliases import CHAMPION, set_alias
from qlora_core.registry.connection import connect, find_or_create_experiment
from qlora_core.registry.versions import BASE_TAG, get_version, register_adapter
from qlora_core.store.artifact import StageKey

Call = Callable[..., tuple[int, dict]]
LINEAGE: dict[str, str] = dict.fromkeys(
    ("base_model", "base_revision", "quantized_base_digest", "data_digest", "config_digest"), "x"
)
FEW = ("--set", "merge.measured_tokens=256", "--set", "merge.calibration_tokens=64")


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "nf4"
    quantize_checkpoint(tiny_base, folder, QuantizeConfig())
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "one"
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = get_peft_model(load_quantized(base, device="cpu"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    made.save_pretrained(str(folder))
    return folder


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    def invoke(*arguments: object) -> tuple[int, dict]:
        with torch.compiler.set_stance("force_eager"):
            result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        return result.exit_code, json.loads(capfd.readouterr().out.splitlines()[-1])

    return invoke


def test_compose_names_the_adapter_and_its_weights(adapter: Path, base: Path, tmp_path: Path, call: Call) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base": str(base), "adapters": [{"path": str(adapter), "weight": 0.5}]}))
    code, made = call("compose", recipe, tmp_path / "half")
    assert code == 0
    assert made["adapter"] == str(tmp_path / "half")
    assert made["weights"] == {"one": 0.5}
    assert call("compose", recipe, tmp_path / "half")[1]["cached"] is True
    recipe.write_text(yaml.safe_dump({"adapters": [{"path": str(adapter), "wieght": 0.5}]}))
    code, said = call("compose", recipe, tmp_path / "other")
    assert (code, said["error"]["type"]) == (2, "ConfigError")
    assert "recipe.yaml:3: adapters.0.wieght: unknown key; did you mean 'weight'?" in said["error"]["message"]


def test_merge_gives_gain_kl_and_certificate_or_a_refusal(
    adapter: Path, base: Path, tmp_path: Path, call: Call
) -> None:
    few = ("--base", base, *FEW)
    code, made = call("merge", adapter, tmp_path / "merged", "--target", "16bit", *few)
    assert code == 0, made
    assert made["gain_retained"] == pytest.approx(1, abs=0.01)
    assert 0 <= made["kl"] < 1e-5
    assert json.loads(Path(made["certificate"]).read_text())["verdict"] == "pass"
    impossible = (*few, "--set", "merge.max_kl_4bit=1e-12", "--set", "merge.candidates=[dequantized-rtn]")
    code, said = call("merge", adapter, tmp_path / "refused", "--target", "nf4", *impossible)
    assert (code, said["error"]["type"]) == (1, "ModelError")
    assert "no merged checkpoint was written" in said["error"]["message"]
    assert not (tmp_path / "refused").exists()
    assert json.loads((tmp_path / "refused.refused.json").read_text())["verdict"] == "fail"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "merge.min_gain=1"], "unknown; allowed: min_gain_16bit"),
        (["--set", "train.max_steps=1"], "takes merge.KEY=VALUE"),
        ([], "names no base folder"),
    ],
)
def test_wrong_use_of_merge_ends_with_2(
    options: list[str], message: str, adapter: Path, tmp_path: Path, call: Call
) -> None:
    homeless = copytree(adapter, tmp_path / "homeless")
    settings = json.loads((homeless / "adapter_config.json").read_text())
    (homeless / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    code, said = call("merge", homeless, tmp_path / "out", *options)
    assert (code, said["error"]["type"]) == (2, "ConfigError")
    assert message in said["error"]["message"]


def test_adapter_commands_answer_in_json(adapter: Path, base: Path, tmp_path: Path, call: Call) -> None:
    code, seen = call("adapter", "inspect", adapter)
    assert (code, seen["rank"]) == (0, 4)
    code, exported = call("adapter", "export", adapter, tmp_path / "out", "--base", base)
    assert (code, exported["adapter"]) == (0, str(tmp_path / "out"))
    code, differs = call("adapter", "diff", adapter, tmp_path / "out")
    assert code == 0
    assert differs["relative_difference"] < 1e-6
    (tmp_path / "text.txt").write_text("The sky is blue.<|endoftext|>The grass is green.<|endoftext|>Snow is white.")
    code, found = call("adapter", "bisect", adapter, "--base", base, "--text", tmp_path / "text.txt")
    assert code == 0
    assert found["by_adapter"][0]["adapter"] == str(adapter)


class Registry:
    """A project whose SQLite registry holds the adapter as version 1, the champion, and another one as version 2."""

    def __init__(self, folder: Path, base: Path, adapter: Path) -> None:
        (folder / "rows.json").write_text("[]")
        self.config = folder / "pipeline.yaml"
        self.config.write_text("data: {sources: [rows.json]}\nbase: {model: demo}\n")
        loaded = load_config(self.config)
        self.name = loaded.registry.model_name
        self.client = connect(loaded.tracking_uri)
        experiment = find_or_create_experiment(self.client, "tests", loaded.work_dir)
        for number, alpha in enumerate((8, 16), 1):
            made = copytree(adapter, folder / f"v{number}")
            settings = json.loads((made / "adapter_config.json").read_text())
            (made / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": alpha}))
            (made / "qlora.json").write_text("{}")
            write_golden_of(base, made, [])
            run_id = self.client.create_run(experiment).info.run_id
            register_adapter(self.client, self.name, made, run_id=run_id, run_key=f"run-{number}", lineage=LINEAGE)
        set_alias(self.client, self.name, CHAMPION, "1")

    def keep_base(self, base: Path) -> str:
        """Store the base as the quantize stage would, beside another one, as what version 1 was trained on."""
        store = Job(load_config(self.config)).store

        def build(out: Path) -> None:
            copytree(base, out, dirs_exist_ok=True)

        store.get_or_build(StageKey("quantize", "1", {"other": True}, {}), lambda out: (out / "x.txt").touch())
        digest = store.get_or_build(StageKey("quantize", "1", {}, {}), build)[0].digest
        self.client.set_model_version_tag(self.name, "1", BASE_TAG, digest)
        return digest

    def tags(self, version: str) -> dict[str, str]:
        found = get_version(self.client, self.name, version).tags
        return {key: value for key, value in found.items() if key.startswith("certificate_")}


def test_a_registered_version_keeps_the_certificate_of_its_merge(
    adapter: Path, base: Path, tmp_path: Path, call: Call
) -> None:
    registry = Registry(tmp_path, base, adapter)
    given, out = ("--base", base, *FEW, "--registry", registry.config), tmp_path / "merged"
    code, said = call("merge", "models:/assistant@champion", tmp_path / "x", "--base", base)
    assert (code, said["error"]["type"]) == (2, "ConfigError") and "needs --registry" in said["error"]["message"]
    code, made = call("merge", "models:/assistant@champion", out, *given, "--no-record")
    assert (code, made["recorded"], registry.tags("1")) == (0, None, {})

    recording = ("--registry", registry.config)
    code, said = call("adapter", "record", out, "models:/assistant/2", *recording)
    assert (code, said["error"]["type"]) == (1, "RegistryError") and "certify this adapter" in said["error"]["message"]
    assert registry.tags("2") == {}
    code, recorded = call("adapter", "record", out, "models:/assistant@champion", *recording)
    digest = digest_json(json.loads((out / "certificate.json").read_text()))
    assert (code, recorded) == (0, {"model": "assistant", "version": "1", "certificate_sha256": digest})
    tags = registry.tags("1")
    assert tags["certificate_16bit_sha256"] == digest and float(tags["certificate_16bit_kl"]) == made["kl"]
    assert call("adapter", "record", out, "models:/assistant/1", *recording) == (0, recorded)
    assert registry.tags("1") == tags

    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    code, said = call("adapter", "record", out, "models:/assistant/1", *recording)
    assert (code, said["error"]["type"]) == (1, "ModelError") and "does not hold the checkpoint" in said["error"][
        "message"
    ]


def test_a_merge_by_address_records_at_once_on_the_version_that_was_merged(
    adapter: Path, base: Path, tmp_path: Path, call: Call
) -> None:
    registry = Registry(tmp_path, base, adapter)
    wanted = ("--target", "nf4", "--base", base, *FEW, "--set", "merge.candidates=[dequantized-rtn]")
    loose = ("--set", "merge.max_kl_4bit=10", "--set", "merge.min_gain_4bit=0", "--set", "merge.min_projection=0")
    free = ("--set", "merge.min_top1_4bit=0", "--set", "merge.min_predicted_projection=0")
    out = tmp_path / "merged"
    code, made = call("merge", "models:/assistant/2", out, *wanted, *loose, *free, "--registry", registry.config)
    assert code == 0, made
    assert (made["recorded"]["version"], registry.tags("1")) == ("2", {})
    assert registry.tags("2")["certificate_nf4_sha256"] == made["recorded"]["certificate_sha256"]
    assert json.loads((out / "certificate.json").read_text())["adapter_digest"] == adapter_digest(tmp_path / "v2")


def test_a_registered_version_is_merged_into_the_base_that_the_store_keeps(
    adapter: Path, base: Path, tmp_path: Path, call: Call
) -> None:
    registry = Registry(tmp_path, base, adapter)
    digest = registry.keep_base(base)
    asked = ("--registry", registry.config, "--no-record", *FEW)
    code, made = call("merge", "models:/assistant@champion", tmp_path / "found", *asked)
    assert code == 0, made
    code, given = call("merge", "models:/assistant@champion", tmp_path / "given", "--base", base, *asked)
    assert code == 0, given
    found, told = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("found", "given"))
    assert found == told

    registry.client.set_model_version_tag(registry.name, "1", BASE_TAG, "0" * 64)
    code, said = call("merge", "models:/assistant@champion", tmp_path / "none", *asked)
    assert (code, said["error"]["type"]) == (1, "StoreError")
    store = Job(load_config(registry.config)).store.location
    for part in ("version 1 of assistant", "0" * 64, store, "--base", "qlora run"):
        assert part in said["error"]["message"]
    assert digest not in said["error"]["message"] and not (tmp_path / "none").exists()


def test_a_damaged_base_in_the_store_is_not_merged_into(adapter: Path, base: Path, tmp_path: Path, call: Call) -> None:
    registry = Registry(tmp_path, base, adapter)
    digest = registry.keep_base(base)
    weights = Job(load_config(registry.config)).store.backend.pool.views / digest / "model.safetensors"
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    code, said = call("merge", "models:/assistant/1", tmp_path / "out", "--registry", registry.config, *FEW)
    assert (code, said["error"]["type"]) == (1, "StoreError") and digest in said["error"]["message"]


def test_inspect_takes_a_registered_version(adapter: Path, base: Path, tmp_path: Path, call: Call) -> None:
    registry = Registry(tmp_path, base, adapter)
    code, seen = call("adapter", "inspect", "models:/assistant@champion", "--registry", registry.config)
    assert (code, seen["digest"]) == (0, adapter_digest(tmp_path / "v1"))
    assert adapter_digest(Path(seen["adapter"])) == seen["digest"] != adapter_digest(tmp_path / "v2")
    code, said = call("adapter", "inspect", "models:/assistant@champion")
    assert (code, said["error"]["type"]) == (2, "ConfigError") and "needs --registry" in said["error"]["message"]


def test_serve_without_a_base_takes_the_one_of_its_registered_adapters(
    adapter: Path, base: Path, tmp_path: Path, call: Call
) -> None:
    code, said = call("serve", "--adapter", f"one={adapter}")
    assert (code, said["error"]["type"]) == (2, "ConfigError") and "no BASE is given" in said["error"]["message"]
    registry = Registry(tmp_path, base, adapter)
    registry.keep_base(base)
    asked = ("--registry", registry.config, "--adapter", "one=models:/assistant/1")
    code, said = call("serve", *asked, "--adapter", "two=models:/assistant/2")
    assert (code, said["error"]["type"]) == (2, "ConfigError") and "on 2 bases" in said["error"]["message"]
    code, said = call("serve", "--registry", registry.config, "--adapter", "two=models:/assistant/2")
    assert (code, said["error"]["type"]) == (1, "StoreError") and "its folder as BASE" in said["error"]["message"]

    command = [str(Path(sys.executable).with_name("qlora")), "serve", *map(str, asked), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["models"] == ["base", "one"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
