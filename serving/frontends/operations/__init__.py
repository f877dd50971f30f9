"""Routes of the server itself, whatever dialect its clients speak: how it is, what it counts, what an operator may change."""
