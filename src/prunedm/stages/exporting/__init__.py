"""The parts of `export`: the job, one file per format, and what int8 costs in quality."""
