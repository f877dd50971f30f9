"""Networks that read images for a decoder: patches in, embeddings out (`models.api.ImageEncoder`)."""
