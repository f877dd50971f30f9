"""The command line of a server (`launch`), and the models that it names: one, or entries of several from flags or a file."""

from serving.boot.flags.entry import ModelEntry, entries_of, named_model
from serving.boot.flags.file import read_models_file
from serving.boot.flags.models import add_models_flags

__all__ = ["ModelEntry", "add_models_flags", "entries_of", "named_model", "read_models_file"]
