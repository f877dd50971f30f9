"""Who talks to the outside: HTTP with its dialects, and gRPC. They translate to calls of the text service; no policy lives here."""
