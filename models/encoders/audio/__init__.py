"""Towers that hear: frames of a spectrogram in, embeddings out, or what Whisper's decoder attends to."""
