"""A pack: adapters trained together over one frozen base, each on its own rows, each as if it were alone."""
