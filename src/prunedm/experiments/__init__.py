"""Many recipes: which ones a sweep is made of, running them side by side, and what came out."""
