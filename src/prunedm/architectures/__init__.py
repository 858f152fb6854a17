"""One file per family of networks: what the engine must know about it."""
