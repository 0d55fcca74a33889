"""What `qlora init` writes: a commented config that runs as is, and generated data for it. Imports no torch."""

import shutil
import tempfile
from pathlib import Path

from qlora_core.demo.config_text import demo_config
from qlora_core.demo.instructions import write_instructions
from qlora_core.errors import ConfigError


def write_starter(folder: Path, *, keep_existing: bool = False) -> tuple[Path, bool]:
    """Write `pipeline.yaml` and `data/` into `folder`; returns the config's path and whether it was written.

    A config that is there already is never overwritten: it is kept with `keep_existing`, else ConfigError. The config
    comes last, so that its presence says the data is complete.
    """
    config = folder / "pipeline.yaml"
    if config.exists():
        if keep_existing:
            return config, False
        raise ConfigError(f"{config} exists already; name another folder, or remove it first")
    data = folder / "data"
    if data.exists() and any(data.iterdir()):
        raise ConfigError(f"{data} exists already and is not empty; name another folder, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".init-", dir=folder) as staging:
        write_instructions(Path(staging) / "data")
        shutil.rmtree(data, ignore_errors=True)
        (Path(staging) / "data").rename(data)
        text = Path(staging) / "pipeline.yaml"
        text.write_text(demo_config(), encoding="utf-8")
        text.rename(config)
    return config, True
