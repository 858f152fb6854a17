"""`python -m prunedm`, the same as `prunedm`."""

from prunedm.cli import main

main()
