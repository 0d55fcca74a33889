"""`qlora store`: each command on a real store, as people and as scripts call it."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner

from flows.cli.app import app
from flows.cli.store_arguments import duration_s
from qlora_core.errors import ConfigError
from qlora_core.store.contents import seal
from qlora_core.store.layout import BLOBS, blob_name
from qlora_core.store.lease import finish
from qlora_core.store.local import LocalFolder
from qlora_core.store.manifest import Manifest, new_manifest
from qlora_core.store.refs import add_ref
from qlora_core.store.store import Store
from qlora_core.store.work import WorkArea

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(LocalFolder(tmp_path / "store"))


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], store: Store) -> Run:
    """Run a store command on the store; returns the exit code and what it said."""

    def run(*arguments: object) -> tuple[int, str]:
        given = [str(argument) for argument in arguments]
        result = CliRunner().invoke(app, ["store", *given, "--store", store.location])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        captured = capfd.readouterr()
        return result.exit_code, result.output + captured.out + captured.err

    return run


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str], store: Store) -> Callable[..., dict[str, Any]]:
    """Run a store command with --json; returns the one object."""

    def run(*arguments: object, exit_code: int = 0) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["store", *map(str, arguments), "--json", "--store", store.location])
        assert result.exit_code == exit_code, result.output
        (line,) = capfd.readouterr().out.splitlines()
        return json.loads(line)

    return run


Told = Callable[..., dict[str, Any]]


def publish(store: Store, stage: str, config: dict[str, Any], inputs: dict[str, str] | None = None) -> Manifest:
    with store.backend.staging() as folder:
        (folder / "result.json").write_text(json.dumps([stage, config, inputs]))
        files = seal(folder)
        manifest = new_manifest(stage, "1", config, inputs or {}, files)
        store.backend.send(folder, files, BLOBS)
    finish(store.backend, manifest)
    return manifest


@pytest.fixture
def rows(store: Store) -> Manifest:
    return publish(store, "curate", {"max_tokens": 512}, {"sources/a.json": "a" * 64})


@pytest.fixture
def swept(store: Store, rows: Manifest) -> Manifest:
    return publish(store, "sweep", {"rate": 0.1}, {"curate": rows.digest})


def test_ls_shows_artifacts_and_what_keeps_them(said: Run, told: Told, rows: Manifest, swept: Manifest) -> None:
    assert told("pin", swept.key[:8], "--name", "audit", "--note", "why")["addresses"] == [swept.address]
    listed = told("ls")["artifacts"]
    assert [(row["key"], row["kept_by"]) for row in listed] == [(swept.key, ["pin audit"]), (rows.key, ["pin audit"])]
    assert [row["stage"] for row in told("ls", "--stage", "curate")["artifacts"]] == ["curate"]
    code, text = said("ls")
    assert code == 0
    assert f"sweep {swept.key[:12]}" in text
    assert "kept by pin audit" in text


def test_ls_of_a_stage_that_is_not_there_names_those_that_are(said: Run, told: Told, swept: Manifest) -> None:
    code, text = said("ls", "--stage", "swep")
    assert code == 0
    assert "0 artifacts of stage swep" in text
    assert "the stages there are: curate, sweep" in text
    assert (told("ls", "--stage", "swep")["artifacts"], told("ls")["stages"]) == ([], ["curate", "sweep"])
    assert "the stages there are" not in said("ls", "--stage", "sweep")[1]


def test_show_and_lineage_tell_what_it_was_made_from(said: Run, told: Told, rows: Manifest, swept: Manifest) -> None:
    assert told("show", rows.key)["used_by"] == [swept.address]
    assert "max_tokens: 512" in said("show", rows.key[:6])[1]
    graph = told("lineage", swept.key)
    assert [node["kind"] for node in graph["nodes"]] == ["external", "artifact", "artifact"]
    assert "sources/a.json <- sources/a.json" in said("lineage", swept.key)[1]
    assert told("lineage")["nodes"] == graph["nodes"]


def test_explain_names_the_setting(said: Run, told: Told, store: Store, rows: Manifest) -> None:
    later = publish(store, "curate", {"max_tokens": 1024}, {"sources/a.json": "b" * 64})
    assert told("explain", later.key)["config"] == [{"path": "max_tokens", "old": 512, "new": 1024}]
    code, text = said("explain", later.key, "--against", rows.key[:10])
    assert code == 0
    assert "max_tokens: 512 -> 1024" in text
    assert "input sources/a.json: aaaaaaaaaaaa… -> bbbbbbbbbbbb…" in text


def test_gc_removes_what_nothing_keeps_and_the_dry_run_nothing(
    said: Run, told: Told, store: Store, rows: Manifest, swept: Manifest
) -> None:
    loose = publish(store, "curate", {"max_tokens": 1}, {})
    told("pin", swept.key, "--name", "audit")
    arguments = ("gc", "--keep-last", "0", "--older-than", "0s")
    expected = told(*arguments, "--dry-run")
    assert [row["key"] for row in expected["artifacts"]] == [loose.key]
    assert "would remove 1 artifacts" in said(*arguments, "--dry-run")[1]
    assert len(told("ls")["artifacts"]) == 3
    assert told(*arguments) == {**expected, "dry_run": False}
    assert [row["key"] for row in told("ls")["artifacts"]] == [swept.key, rows.key]
    told("unpin", "audit")
    assert "removed 2 artifacts and 2 blobs" in said(*arguments)[1]
    assert told("ls")["artifacts"] == []


def test_gc_drops_old_work_only_if_told_to(said: Run, told: Told, store: Store, rows: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    area = WorkArea(store.backend, "sweep/0123456789abcdef/t000", f"stage/sweep/{'0' * 64}", {"curate": rows.digest})
    area.save(folder, "step-00000001")
    everything = ("gc", "--keep-last", "0", "--older-than", "0s")
    assert (told(*everything)["work"], told(*everything)["artifacts"]) == (0, [])
    assert told(*everything, "--drop-work-older-than", "1h")["work"] == 0
    assert area.newest() is not None
    assert told(*everything, "--drop-work-older-than", "0s")["work"] == 1
    assert area.newest() is None


def test_references_are_listed_and_taken_away_by_the_name_that_is_shown(
    said: Run, told: Told, store: Store, swept: Manifest, rows: Manifest
) -> None:
    keys = ["3f2a9c" + "0" * 58, "3f2a9c" + "1" * 58]
    for key in keys:
        add_ref(store.backend, "model", f"assistant/{key}", [swept.address])
    told("pin", rows.key, "--name", "audit", "--note", "why")
    assert f"kept by model assistant/{keys[0][:12]}, model assistant/{keys[1][:12]}\n" in said("ls")[1]
    listed = told("refs")["refs"]
    assert [(ref["kind"], ref["name"]) for ref in listed] == [
        ("pin", "audit"),
        ("model", f"assistant/{keys[1]}"),
        ("model", f"assistant/{keys[0]}"),
    ]
    assert listed[1]["addresses"] == [swept.address]
    assert all(ref["created"] for ref in listed)
    text = said("refs")[1]
    assert f"model assistant/{keys[1][:12]}  20" in text
    assert f"    keeps sweep/{swept.key[:12]}\n" in text
    code, text = said("unref", "assistant/3f2a9c")
    assert (code, "means 2 references" in text) == (2, True)
    assert told("unref", f"assistant/{keys[1][:12]}")["name"] == f"assistant/{keys[1]}"
    assert "took model assistant/3f2a9c0" in said("unref", "assistant/3f2a9c")[1]
    assert [ref["name"] for ref in told("refs")["refs"]] == ["audit"]
    told("unpin", "audit")
    assert len(told("gc", "--keep-last", "0", "--older-than", "0s")["artifacts"]) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("audit", "`qlora store unpin audit`"),
        ("assistant", "there are: assistant/abcdefabcdef"),
        ("assistant/abc", "no"),
    ],
)
def test_unref_of_what_is_no_reference_changes_nothing(
    said: Run, told: Told, store: Store, swept: Manifest, name: str, message: str
) -> None:
    add_ref(store.backend, "model", f"assistant/{'abcdef' * 10}abcd", [swept.address])
    told("pin", swept.key, "--name", "audit")
    code, text = said("unref", name)
    assert (code, message in text) == (2, True)
    assert len(told("refs")["refs"]) == 2


def test_gc_keeps_the_young_by_default(told: Told, swept: Manifest) -> None:
    assert told("gc", "--keep-last", "0")["artifacts"] == []


def test_verify_ends_with_1_where_something_is_broken(
    said: Run, told: Told, store: Store, swept: Manifest, tmp_path: Path
) -> None:
    assert told("verify")["ok"] is True
    sha256 = swept.files["result.json"].sha256
    (tmp_path / "store" / blob_name(sha256)).unlink()
    code, text = said("verify")
    assert code == 1
    assert f"breaks result.json of sweep {swept.key[:12]}" in text
    assert told("verify", "--repair", exit_code=1)["set_aside"]
    assert told("verify")["ok"] is True


def test_what_only_a_person_can_mend_is_told_and_stays(
    said: Run, told: Told, store: Store, swept: Manifest, rows: Manifest
) -> None:
    told("pin", swept.key, "--name", "audit")
    told("pin", rows.key, "--name", "sound")
    store.backend.remove(f"{swept.address}/manifest.json")
    code, text = said("verify", "--repair")
    assert code == 1
    assert f"v1/stage/sweep/{swept.key[:12]} is not there, though pin audit names it" in text
    assert "quarantine" not in text
    (record,) = (each for each in store.backend.list("v1/pin/") if "audit" in each.name)
    found = store.backend.read(record.name)
    assert found is not None and store.backend.replace(record.name, b"{}", found.tag)
    for command in (["verify", "--repair"], ["refs"], ["show", rows.key], ["ls"]):
        assert "v1/pin/audit.json is no sound reference" in said(*command)[1], command
    assert "`qlora store unpin audit`" in said("refs")[1]
    assert [ref["name"] for ref in told("refs")["refs"]] == ["sound"]


def test_export_and_import_carry_an_artifact_to_a_new_store(
    told: Told, capfd: pytest.CaptureFixture[str], rows: Manifest, swept: Manifest, tmp_path: Path
) -> None:
    file, target = tmp_path / "adapter.tar", tmp_path / "fresh"
    assert len(told("export", swept.key[:6], file, "--with-inputs")["artifacts"]) == 2
    result = CliRunner().invoke(app, ["store", "import", str(file), "--store", str(target), "--json"])
    assert result.exit_code == 0
    imported = json.loads(capfd.readouterr().out)["imported"]
    assert imported == [f"curate/{rows.key}", f"sweep/{swept.key}"]
    assert Store(LocalFolder(target)).get_at(swept.address) is not None


def test_export_replaces_no_file_unless_forced(said: Run, told: Told, swept: Manifest, tmp_path: Path) -> None:
    file = tmp_path / "thesis.pdf"
    file.write_bytes(b"years of work")
    code, text = said("export", swept.key, file)
    assert (code, file.read_bytes()) == (2, b"years of work")
    assert "--force" in text
    assert told("export", swept.key, file, "--force")["size_bytes"] == file.stat().st_size


@pytest.mark.parametrize("command", [["import", "none.tar"], ["export", "KEY", "none/a.tar"], ["import", "."]])
def test_wrong_paths_are_wrong_arguments(
    said: Run, swept: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = said(*[swept.key if word == "KEY" else word for word in command])
    assert code == 2
    assert f"{command[-1]}: " in text
    assert "`store`" not in text


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A client of an S3 server with a bucket "told-by-url", to which the environment leads."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example-secret-1234")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    client = boto3.client("s3")
    client.create_bucket(Bucket="told-by-url")
    yield client
    server.stop()


def test_what_is_written_to_a_bucket_by_its_url_is_encrypted_as_asked(
    told: Told, swept: Manifest, bucket: Any, tmp_path: Path
) -> None:
    told("export", swept.key, tmp_path / "a.tar")
    asked = ["--store", "s3://told-by-url", "--encryption", "aws:kms", "--kms-key-id", "alias/ml"]
    commands = [["import", str(tmp_path / "a.tar")], ["pin", swept.key, "--name", "audit"], ["gc"], ["verify"]]
    for command in commands:
        result = CliRunner().invoke(app, ["store", *command, *asked])
        assert result.exit_code == 0, result.output
    written = [found["Key"] for found in bucket.list_objects_v2(Bucket="told-by-url")["Contents"]]
    assert {name.split("/")[1] for name in written} == {"blob", "lease", "pin", "stage"}
    for name in written:
        head = bucket.head_object(Bucket="told-by-url", Key=name)
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "alias/ml"), name


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (["--store", "here"], "is a folder"),
        (["--config", "pipeline.yaml"], "a config says its own"),
    ],
)
def test_encryption_that_nobody_would_heed_is_refused(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, place: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["store", "gc", "--encryption", "AES256", *place])
    assert result.exit_code == 2
    assert message in result.output + capfd.readouterr().err


WRONG: list[tuple[list[str], str]] = [
    (["show", "zzz"], "6 hex digits"),
    (["show", "0123456789"], "the newest here are curate/"),
    (["gc", "--older-than", "soon"], "30m, 12h, 7d"),
    (["gc", "--older-than", "-1d"], "30m, 12h, 7d"),
    (["unpin", "audit"], "no pin 'audit'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_wrong_arguments_exit_2_and_say_what_is_right(
    said: Run, told: Told, rows: Manifest, arguments: list[str], message: str
) -> None:
    code, text = said(*arguments)
    assert code == 2
    assert message in text
    assert told(*arguments, exit_code=2)["error"]["type"] == "ConfigError"


def test_store_is_that_of_the_config_here_or_named(
    qlora: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nowhere = qlora("store", "ls")
    assert nowhere.returncode == 2
    assert "--store" in nowhere.stderr
    assert "--config" in nowhere.stderr
    made = publish(Store(LocalFolder(tmp_path / "here")), "sweep", {})
    (tmp_path / "pipeline.yaml").write_text("data: {sources: [rows.json]}\nbase: {model: demo}\nstore: here\n")
    assert json.loads(qlora("store", "ls", "--json").stdout)["artifacts"][0]["key"] == made.key
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert qlora("store", "ls", "--config", "../pipeline.yaml", "--json").stdout.count(made.key) == 1
    both = qlora("store", "ls", "--config", "../pipeline.yaml", "--store", "../here")
    assert (both.returncode, "one of them" in both.stderr) == (2, True)
    assert not (tmp_path / "sub" / ".qlora").exists()


def test_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["store", "gc", "--store", str(tmp_path / "typo")])
    assert result.exit_code == 2
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0), ("30m", 1800), ("12h", 43200), ("7d", 604800), ("1.5h", 5400)]
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "7 days", "-1d", "1e9d", "7D"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(ConfigError, match="no length of time"):
        duration_s(text)


def test_commands_import_nothing_heavy(tmp_path: Path, swept: Manifest) -> None:
    heavy = ("torch", "transformers", "ray", "mlflow", "prefect", "boto3", "polars")
    commands = [["ls"], ["show", swept.key], ["verify"], ["explain", swept.key], ["lineage"], ["gc"],
                ["export", swept.key, str(tmp_path / "a.tar")], ["import", str(tmp_path / "a.tar")]]  # fmt: skip
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom flows.cli.app import app\n"
        f"for command in {commands!r}:\n"
        f"    result = CliRunner().invoke(app, ['store', *command, '--store', {str(tmp_path / 'store')!r}])\n"
        "    assert result.exit_code == 0, result.output\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
