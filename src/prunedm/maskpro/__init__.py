"""MaskPro's Python interface, for scripts with their own loop; the stages do the same as commands."""
