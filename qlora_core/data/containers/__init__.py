"""One module per kind of file: how its bytes become records. None knows what a dataset format is."""
