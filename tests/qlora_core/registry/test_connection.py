"""What is told of an MLflow that fails: the cause too, and neither credentials nor what a statement would store."""

import pytest
from mlflow.exceptions import MlflowException

from qlora_core.errors import RegistryError
from qlora_core.registry.connection import registry_errors


def told(message: str) -> str:
    with pytest.raises(RegistryError) as raised, registry_errors("downloading models:/a/1"):
        raise MlflowException(message)
    return str(raised.value)


def test_the_cause_below_the_heading_is_told_in_one_line() -> None:
    said = told("The following failures occurred:\n##### File qlora.json #####\nFailed to download 1 chunk(s).\n")
    assert "MLflow failed while downloading models:/a/1: The following failures occurred:" in said
    assert "Failed to download 1 chunk(s).; check registry.tracking_uri" in said
    assert "\n" not in said


def test_no_statement_traceback_or_password_is_told() -> None:
    said = told("(OperationalError) at postgresql://me:secret@host/db is locked\n[SQL: INSERT 'a row']\nTraceback: x")
    assert "(OperationalError) at postgresql://host/db is locked; check" in said
    assert not any(hidden in said for hidden in ("secret", "a row", "Traceback"))
