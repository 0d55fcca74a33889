"""Adapters after training: composed, merged, proven and exported. The algebra is our own, in float32, on deltas."""
