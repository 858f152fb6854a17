"""`prunedm monitor`: the runs on this machine, their progress and their resources."""
