"""Images and sound of requests, as an engine takes them."""

from serving.engine.api.media.items import Media, MediaItem

__all__ = ["Media", "MediaItem"]
