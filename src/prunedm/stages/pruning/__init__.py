"""What `prune` is made of: the job, and one function for each mechanism."""
