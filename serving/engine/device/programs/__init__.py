"""The programs of an engine: which there are, what they compute, how their arguments are packed and placed, and compiling them."""
