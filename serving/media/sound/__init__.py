"""Sound of requests: files to samples (`files`), and those to what encoders read (`spectrum`). Numpy alone, and soundfile
for the files."""

from serving.media.sound.files import (
    MAX_CHANNELS,
    RATE,
    RATES,
    Resampler,
    read_sound,
    resampled,
    said_seconds,
    sound_pieces,
)

__all__ = ["MAX_CHANNELS", "RATE", "RATES", "Resampler", "read_sound", "resampled", "said_seconds", "sound_pieces"]
