"""The flags of a server of several models, beside `--model` itself."""

from __future__ import annotations

import argparse

from serving.boot.engine_flags import reader
from serving.engine.api.settings import SECONDS, SIZE


def add_models_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what `entries_of` reads, and how the models share the server."""
    group = parser.add_argument_group("several models")
    group.add_argument(
        "--models", default=None, metavar="FILE",
        help="models to serve under their names, each with settings of its own: YAML, JSON or TOML "
        "(docs/models_together.md). Or give --model several times, as NAME=MODEL (default: one model)",
    )  # fmt: skip
    group.add_argument(
        "--models-memory", type=reader(SIZE), default=None, metavar="SIZE",
        help="what loaded models may take together, weights and KV caches (default: 60% of the memory that is free on "
        "CPU, what the devices have elsewhere)",
    )  # fmt: skip
    group.add_argument(
        "--model-wait", type=reader(SECONDS), default=120.0, metavar="S",
        help="how long a request waits for a model that is not loaded before it is refused",
    )  # fmt: skip
    group.add_argument(
        "--model-turn", type=reader(SECONDS), default=10.0, metavar="S",
        help="how long a model stays loaded, once requests run with it, before it gives way to another that is waited for",
    )  # fmt: skip
