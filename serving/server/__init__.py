"""One run of the server: ports first, then the engine, then requests, and an end that tells everybody."""
