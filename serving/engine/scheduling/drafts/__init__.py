"""Drafts: guesses of a request's next tokens, which one step verifies together. Plain host code; see planner.py.

`history.py` and `corpus.py` find where a request's last tokens stood before, `guesses.py` follows what came after them there,
`rates.py` learns how often such guesses are right, `costs.py` what steps take, and `planner.py` chooses.
"""
