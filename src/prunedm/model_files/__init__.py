"""What stands in a model folder, read without trust: configurations, weights, the noise schedule."""
