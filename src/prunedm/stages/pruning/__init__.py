"""Parts of `prune`: the job, and one function per mechanism."""
