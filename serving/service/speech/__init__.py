"""Speech to text with Whisper: rules of its tokens, windows of a sound file, segments and subtitles."""
