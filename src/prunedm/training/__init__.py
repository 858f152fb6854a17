"""The one training loop: denoisers from scratch, fine-tuning, mask logits."""
