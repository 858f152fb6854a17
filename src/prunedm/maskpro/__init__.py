"""MaskPro's Python interface, for those who drive the steps themselves; the stages do the same whole."""
