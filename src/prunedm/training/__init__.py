"""The training loop of all training: from scratch, fine-tuning, mask logits."""
