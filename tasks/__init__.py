"""Prefect tasks, one module per stage: retries, run names, logs and artifacts around the library's stages."""
