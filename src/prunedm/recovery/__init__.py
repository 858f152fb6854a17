"""Recovering quality: the objectives of fine-tuning."""
