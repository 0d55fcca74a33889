"""Usage reporting of the libraries underneath, off unless the user says otherwise. Knows nothing of our own logs."""

import os

_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "BITSANDBYTES_NOWELCOME": "1",
}


def disable_usage_reporting() -> None:
    """Set each library's opt-out in the environment, before it is imported; a variable already set is left alone."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
