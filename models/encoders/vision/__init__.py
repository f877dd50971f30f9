"""Towers that see: patches of images, or of videos' frames, in, embeddings out. A file a kind of tower; others begin as `plain` and
`qwen` do."""
