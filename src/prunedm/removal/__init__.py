"""Removing weights: from scores to masks or a channel plan."""
