"""The gate: evidence and a policy in, a verdict with reasons out. Knows no registry, no model and no store."""
