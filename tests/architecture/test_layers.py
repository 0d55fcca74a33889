"""The import rules hold, and the rules themselves catch what they are there for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_import_contracts_are_kept() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("boto3", {"qlora_core/store/s3/client.py"}),
        ("botocore", {"qlora_core/store/s3/client.py", "qlora_core/store/s3/explain.py"}),
        ("ray", {"qlora_core/sweep/cluster.py", "qlora_core/sweep/ray_connection.py"}),
        ("aiohttp", {"qlora_core/evaluation/judge/client.py"}),
        ("fastapi", {"qlora_core/evaluation/vote/page.py", "qlora_core/serving/app.py"}),
        ("uvicorn", {"qlora_core/evaluation/vote/server.py", "qlora_core/serving/server.py"}),
    ],
)
def test_service_has_one_home(package: str, home: set[str]) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in _sources()
        for line in path.read_text().splitlines()
        if line.strip().startswith((f"import {package}", f"from {package}")) and _imports(line, package)
    }
    assert users == home


def test_prefect_appears_nowhere_in_the_library() -> None:
    users = [
        path for path in _sources() if path.is_relative_to(ROOT / "qlora_core") and "import prefect" in path.read_text()
    ]
    assert users == []


def test_nothing_crosses_a_boundary_as_pickle() -> None:
    forbidden = ("import pickle", "import cloudpickle", "torch.load(", "trust_remote_code=True", "weights_only=False")
    users = [(path.name, word) for path in _sources() for word in forbidden if word in path.read_text()]
    assert users == []


def _imports(line: str, package: str) -> bool:
    name = line.strip().split()[1].rstrip(",")
    return name == package or name.startswith(f"{package}.")


def _sources() -> list[Path]:
    return [path for package in ("flows", "tasks", "qlora_core") for path in sorted((ROOT / package).rglob("*.py"))]
