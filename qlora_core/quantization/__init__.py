"""Four-bit storage of a base model: which checkpoints are accepted, how they are quantized, what is audited."""
