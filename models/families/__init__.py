"""The families, each a file with its `FAMILIES`, by the name of their line.

A line of several files has a room of its name: `qwen/` has Qwen 2 to 3.8 with their mixtures and what sees. The only file of a
line stands here. Two rooms have families by what they do, since they take the decoders of several lines: `classifiers/` (labels and
scores) and `multimodal/` (LLaVA, InternVL, Idefics, what hears, Whisper). `bert/` has all encoders of that kind. A network that is
published under several names is in the room of the line that made it, and takes from the other what it shares.

`models/registry.py` finds all of them by itself.
"""
