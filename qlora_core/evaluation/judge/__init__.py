"""The judges: who compares two answers, what that costs, how far it can be trusted. Knows no gate and no report."""
