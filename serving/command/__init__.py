"""`jaxserve`, the one command: each of its words is a module that `python -m` runs too, or is here."""
