"""Where the base model's files are: a folder, the hub, or the demo model made on the spot. Imports no torch."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qlora_core.config.pipeline import PipelineConfig
from qlora_core.digest import digest_files
from qlora_core.errors import ConfigError, ModelError
from qlora_core.quantization.checkpoint import check_checkpoint, checkpoint_files, max_positions, tokenizer_files

DEMO_MODEL = "demo"
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True)
class BaseModelFiles:
    """A base checkpoint on local disk. Digests are read from the files once, when first asked for."""

    folder: Path
    revision: str | None = None

    @cached_property
    def digest(self) -> str:
        """Identity of weights, model config and tokenizer together."""
        return digest_files({**checkpoint_files(self.folder), **tokenizer_files(self.folder)})

    @cached_property
    def tokenizer_digest(self) -> str:
        """Identity of the tokenizer alone: all that curation depends on."""
        return digest_files(tokenizer_files(self.folder))

    @cached_property
    def max_positions(self) -> int:
        """Longest sequence the model takes, in tokens."""
        return max_positions(self.folder)


def is_demo(config: PipelineConfig) -> bool:
    """Whether the base model is the one the project makes itself."""
    return config.base.model == DEMO_MODEL


def locate_base(config: PipelineConfig) -> BaseModelFiles:
    """The checked checkpoint that `base.model` names (not for the demo model, which is a stage of its own).

    Raises ModelError for a folder without safetensors weights, ConfigError for what is neither folder nor hub name.
    """
    name = config.base.model
    folder = config.path(name)
    if folder.is_dir():
        check_checkpoint(folder)
        return BaseModelFiles(folder, config.base.revision)
    if not _HUB_NAME.match(name) or name.startswith((".", "/")):
        raise ConfigError(
            f"base.model {name!r}: no such folder ({folder}), and no hub name of the form owner/model; "
            "relative paths start at the config file's folder; `demo` makes a small model on the spot"
        )
    return _from_hub(name, config.base.revision)


def _from_hub(name: str, revision: str | None) -> BaseModelFiles:
    if revision is None or not _COMMIT.match(revision):
        raise ConfigError(
            f"base.revision is {revision!r}; a hub model needs the full 40-digit commit, so that runs can be repeated: "
            f"take it from the history of {name}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (RepositoryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"cannot fetch base.model {name!r} at {revision} from the hub: {error}; "
            "check name, commit and network, or give a checkpoint folder"
        ) from error
    check_checkpoint(folder)
    return BaseModelFiles(folder, revision)
