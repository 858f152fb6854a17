"""Faults from outside: kills at every file operation of every verb, and a table of damaged inputs.

`python -m tests.faults --kills 50 --inputs all` from the repository's root prints the counts that
docs quote. A verb is one line in `kills.VERBS`; a damage, a file or a value one line in `inputs`.
"""
