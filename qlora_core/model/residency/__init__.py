"""How a stored 4-bit layer executes: dense, through a shared scratch buffer, or by bitsandbytes' own kernels."""
