"""What `export` is made of: the job, one writer a format, and what int8 costs in quality."""
