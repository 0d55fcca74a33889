"""Evaluation: held-out loss, exact match, judges, verdicts, ratings, agreement."""
