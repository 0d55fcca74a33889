"""Keeps evaluation items out of the training rows: reads the sets, finds overlaps, decides, shows the evidence."""
