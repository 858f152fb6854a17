"""Sweeps: the recipes they consist of, running them in parallel, and their results."""
