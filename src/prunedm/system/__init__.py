"""The machine and its processes: running stages, locks, signals, environment, paths."""
