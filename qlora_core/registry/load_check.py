"""Proof that a registered adapter works where it will be used: loaded in a clean process, it gives its golden logits.

`check_version` starts that process; run as a module, this file is that process. It fetches `models:/<name>/<version>`
as any service would, verifies the bytes, and needs the base and the adapter alone: no training code, nothing of the
driver's memory. Knows nothing of aliases or the gate.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_core.errors import QloraError, RegistryError
from qlora_core.registry.connection import prepare_environment, registry_errors, without_credentials
from qlora_core.registry.versions import ADAPTER_TAG, BASE_TAG, RegisteredVersion, verify_adapter

# The tag of a version that passed, and its value.
LOAD_CHECK_TAG = "load_check"
PASSED = "passed"
_STDERR_SHOWN = 2000
# Largest difference of any logit: absolute in float32; in bfloat16, whose steps grow with the value, relative to the
# largest logit (2**-8 is one rounding; several layers add up).
FLOAT32_TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 2e-2


def check_version(
    tracking_uri: str, version: RegisteredVersion, quantized_folder: Path, *, timeout_s: float = 900.0
) -> dict[str, Any]:
    """Load the version over `quantized_folder` in a new process and compare its logits with the golden ones.

    Returns {"prompts", "max_difference" (of any logit), "tolerance", "seconds"}. Raises RegistryError when the bytes
    are not those registered, when the adapter does not load, when a logit differs, or when nothing is heard for
    `timeout_s`.
    """
    request = {
        "tracking_uri": tracking_uri,
        "name": version.name,
        "version": version.version,
        ADAPTER_TAG: version.tag(ADAPTER_TAG),
        BASE_TAG: version.tag(BASE_TAG),
        "quantized_folder": str(quantized_folder.absolute()),
    }
    named = f"version {version.version} of {version.name!r}"
    with tempfile.TemporaryDirectory(prefix="load-check-") as folder:
        result = _run_child(request, Path(folder), named, timeout_s)
    if not result["ok"]:
        raise RegistryError(f"{named} failed its check in a clean process, no alias was moved: {result['reason']}")
    return {key: value for key, value in result.items() if key != "ok"}


def _run_child(request: Mapping[str, Any], folder: Path, named: str, timeout_s: float) -> dict[str, Any]:
    # The request goes through standard input: an address may hold a password, and arguments are public on the machine.
    answer = folder / "answer.json"
    command = [sys.executable, "-m", "qlora_core.registry.load_check", str(answer)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise RegistryError(
            f"{named} was not loaded within {timeout_s:g} s in a clean process, no alias was moved; "
            "see whether the machine is overloaded, then run the command again"
        ) from error
    if done.returncode != 0 or not answer.is_file():
        tail = without_credentials(done.stderr.strip()[-_STDERR_SHOWN:])
        raise RegistryError(
            f"the process loading {named} ended with status {done.returncode}; no alias was moved; it said: {tail}"
        )
    return json.loads(answer.read_text())


def check_in_this_process(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The check itself, with `folder` for the download. {"ok": True, ...figures} or {"ok": False, "reason"}."""
    started = time.monotonic()
    try:
        local = _download(request, folder)
        verify_adapter(local, request[ADAPTER_TAG], f"version {request['version']} of {request['name']!r}")
        figures = _verify_golden(local, Path(request["quantized_folder"]), request[BASE_TAG])
    except QloraError as error:
        return {"ok": False, "reason": str(error)}
    return {"ok": True, **figures, "seconds": time.monotonic() - started}


def _download(request: Mapping[str, Any], folder: Path) -> Path:
    prepare_environment()
    import mlflow
    import mlflow.artifacts

    # models:/ addresses are resolved through MLflow's globals only; this process serves no other address.
    mlflow.set_tracking_uri(request["tracking_uri"])
    mlflow.set_registry_uri(request["tracking_uri"])
    uri = f"models:/{request['name']}/{request['version']}"
    with registry_errors(f"downloading {uri}"):
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))


def _verify_golden(adapter: Path, quantized_folder: Path, base_digest: str) -> dict[str, Any]:
    import torch

    from qlora_core.model.adapter import attach_adapter, read_golden, verify_golden
    from qlora_core.model.base import load_quantized

    precision = json.loads((adapter / "qlora.json").read_text(encoding="utf-8")).get("precision", "auto")
    base = load_quantized(quantized_folder, precision=precision)
    model = attach_adapter(base, adapter, expected_base_digest=base_digest)
    golden = read_golden(adapter)
    in_float32 = next(base.parameters()).dtype == torch.float32
    largest = max(logits.abs().max().item() for logits in golden.logits)
    tolerance = FLOAT32_TOLERANCE if in_float32 else BFLOAT16_TOLERANCE * largest
    difference = verify_golden(model, adapter, atol=tolerance)
    return {"prompts": len(golden.prompts), "max_difference": difference, "tolerance": tolerance}


def main() -> None:
    """Read a request on standard input, write the answer to the file named by the only argument."""
    request = json.load(sys.stdin)
    with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
        result = check_in_this_process(request, Path(folder))
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
