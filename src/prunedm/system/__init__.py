"""The machine and its processes: who runs, who is watched, who waits, what is locked or told outside."""
