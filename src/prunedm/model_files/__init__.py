"""Reading untrusted model folders: configurations, weights, the noise schedule."""
