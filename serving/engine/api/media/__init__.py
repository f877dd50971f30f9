"""Images and sound of requests, as an engine takes them."""

from serving.engine.api.media.items import Media, MediaItem, MediaOrigin, outline_of

__all__ = ["Media", "MediaItem", "MediaOrigin", "outline_of"]
