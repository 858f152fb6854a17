"""One file a family of networks: what the engine must be told about it."""
