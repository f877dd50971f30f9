"""Weights that were converted once, kept in a folder of this user as they lie in memory: the next start maps them."""
