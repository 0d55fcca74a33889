"""Usage reporting is off unless the user has said otherwise."""

import os

import pytest

from qlora_core.telemetry import disable_usage_reporting


def test_every_library_is_told_not_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "MLFLOW_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    disable_usage_reporting()
    assert [os.environ[name] for name in names] == ["1", "false", "true", "0"]


def test_what_the_user_has_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    disable_usage_reporting()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
