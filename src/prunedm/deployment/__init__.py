"""Models for other runtimes: the exported graph, its description, and exported files as denoisers."""
