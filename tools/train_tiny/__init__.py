"""Train `models/baton-tiny`, the language model that Baton ships, from text at hand.

`run.sh` is the whole recipe; README.md says what each step reads and writes.
"""
