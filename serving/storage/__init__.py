"""What is kept between requests for clients: entries of one tenant each, in one SQLite file, until they expire."""

from serving.storage.store import Entry, Page, Store, StoreSettings

__all__ = ["Entry", "Page", "Store", "StoreSettings"]
