"""Side by side against peers, in one process, interleaved: `make bench`."""
