"""The demo: a small base model and an instruction set, both made on the spot from the project's own sentences."""
