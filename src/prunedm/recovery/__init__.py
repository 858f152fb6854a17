"""Bringing quality back: the training loop, EMA and distillation."""
