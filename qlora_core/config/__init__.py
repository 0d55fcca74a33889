"""The pipeline config: strict sections, loading with line numbers, digests. Knows nothing of what the settings do."""
