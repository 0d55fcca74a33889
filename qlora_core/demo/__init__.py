"""The demo: a small base model and an instruction set, both made on the spot. Needs no network and no data of others."""
