"""What is left, measured: loss, FD, speed, size, sparsity; and the report that shows it."""
