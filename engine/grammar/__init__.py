"""Grammars: languages that an output must belong to, as masks over the vocabulary.

`spec` says what a request asks for, `backend` what a grammar library must offer, `compiler` keeps
compiling off the scheduler's thread and within bounds. llguidance is the library; it is imported in
`llguidance_backend` and `llguidance_source` alone.
"""
