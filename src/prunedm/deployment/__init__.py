"""Files for other runtimes, each checked against the model that it was made from."""
