"""Importing is free of effects, and the command line starts without the heavy libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "ray", "mlflow", "prefect", "bitsandbytes", "peft", "optuna", "boto3", "polars")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from flows.cli.app import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    assert _python(code) == "[]"


def test_plan_of_stored_stages_imports_no_torch() -> None:
    modules = ("qlora_core.pipeline.pipeline", "qlora_core.pipeline.promotion", "qlora_core.pipeline.estimate")
    code = "import sys\n" + "".join(f"import {name}\n" for name in modules)
    code += f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    assert _python(code) == "[]"


def test_help_answers_in_under_a_second_of_cpu_time() -> None:
    before = os.times()
    subprocess.run([str(Path(sys.executable).parent / "qlora"), "--help"], check=True, capture_output=True)
    after = os.times()
    used_s = after.children_user - before.children_user + after.children_system - before.children_system
    assert used_s < 1.0


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"])
def test_importing_modules_reads_no_secret(name: str) -> None:
    code = (
        "import os, sys\n"
        "seen = []\n"
        "original = os.environ.__class__.__getitem__\n"
        "def watch(self, key):\n"
        "    seen.append(key)\n"
        "    return original(self, key)\n"
        "os.environ.__class__.__getitem__ = watch\n"
        "import flows.cli.app, qlora_core.pipeline.promotion\n"
        f"print({name!r} in seen)\n"
    )
    assert _python(code) == "False"


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
