"""Networks that read images or sound for a decoder: patches or frames in, embeddings out (`models.api.ImageEncoder`). What sees is
in `vision`, what hears in `audio`; neither knows the other, and what both are made of lies here."""
