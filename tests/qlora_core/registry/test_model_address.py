"""What an address says that means nothing in a registry that is there."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from qlora_core.errors import RegistryError
from qlora_core.registry.model_address import resolve_address


def test_an_unknown_model_is_told_from_an_unknown_alias(
    client: MlflowClient, tracking_uri: str, tmp_path: Path
) -> None:
    client.create_registered_model("lawyer")
    for address, said in (
        ("models:/lawyer@champion", "'lawyer' has no alias 'champion'"),
        ("models:/lawer@champion", "no model 'lawer' is registered, only 'lawyer'"),
    ):
        with pytest.raises(RegistryError, match=said):
            resolve_address(tracking_uri, address, tmp_path)
