"""What runs on this machine, how far it is, and what it uses: `prunedm monitor`."""
