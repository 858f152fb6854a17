"""Bringing quality back: what fine-tuning aims at."""
