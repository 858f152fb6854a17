"""How weights go: scores in, masks or a channel plan out."""
