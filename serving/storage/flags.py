"""The flags of what is kept, the same for the server and the gateway."""

from __future__ import annotations

import argparse
import pathlib

from serving.storage.store import Store, StoreSettings

DAY_S = 86400.0


def add_store_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what `store_of` reads."""
    group = parser.add_argument_group("what is kept")
    group.add_argument(
        "--store-dir", default=None, metavar="DIR",
        help="keep responses, conversations, files and batches in this folder, each for the key that made it "
        "(default: nothing is kept)",
    )  # fmt: skip
    group.add_argument(
        "--store-days", type=float, default=30.0, metavar="N", help="forget what was not used for so many days"
    )
    group.add_argument(
        "--store-gb", type=float, default=1.0, metavar="GB",
        help="keep so much at most; then the oldest of the key that has most goes",
    )  # fmt: skip


def store_of(args: argparse.Namespace) -> Store | None:
    """The store that parsed flags ask for, opened; None where they ask for none.

    Raises:
        ValueError: it cannot be used, in a sentence.
    """
    for name, what in (("store_days", "days"), ("store_gb", "GB")):
        value = getattr(args, name)
        if not 0 < value < 1e6:
            raise ValueError(f"{name} must be a number of {what} above 0, got {value:g}.")
    if args.store_dir is None:
        return None
    folder = pathlib.Path(args.store_dir).expanduser()
    return Store(StoreSettings(folder, args.store_days * DAY_S, int(args.store_gb * 2**30)))
