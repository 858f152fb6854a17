"""What `evaluate` and `compare` are made of: one model measured, several in turns, and the files."""
