"""The report of a run: one self-contained HTML file. Knows the figures of the stages, not how they were made."""
