"""Many QLoRA trials over one frozen base: search space, rungs, study, workers. Knows nothing of how a trial trains."""
