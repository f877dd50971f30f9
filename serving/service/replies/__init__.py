"""What comes back: streams of tokens as text, stop strings, and whole results."""
