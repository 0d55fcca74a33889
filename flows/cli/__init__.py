"""The `qlora` command line: arguments in, one report out. Knows no numbers; importing it imports no heavy library."""
