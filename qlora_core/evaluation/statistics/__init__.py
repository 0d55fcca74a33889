"""Estimates with intervals from votes, verdicts and scores. Knows numbers, not where they came from."""
