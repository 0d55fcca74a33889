"""Loaded models: the quantized base, adapters on it, answers, losses."""
