"""Several models in one server: loaded when they are asked for, put to sleep when another needs the memory.

For operators: docs/models_together.md.
"""
