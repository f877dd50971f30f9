"""Several models in one server, as flags and a file give them."""

from serving.boot.entries.entry import ModelEntry, entries_of, named_model
from serving.boot.entries.file import read_models_file
from serving.boot.entries.flags import add_models_flags

__all__ = ["ModelEntry", "add_models_flags", "entries_of", "named_model", "read_models_file"]
