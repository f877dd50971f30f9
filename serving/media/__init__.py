"""Images that come with requests: taken out of messages, fetched within bounds, decoded, and made what a model's tower reads.

Pillow does the decoding and resizing (extra `multimodal`); without it, or beside a model that has no tower, nothing here runs.
"""

from serving.media.fetching import MediaPolicy
from serving.media.reader import MediaReader, reader_of

__all__ = ["MediaPolicy", "MediaReader", "reader_of"]
