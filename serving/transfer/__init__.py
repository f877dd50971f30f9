"""Pages that travel between engines: prompts computed by one engine and continued by another, prefixes fetched instead of computed.

`giving` and `taking` are the two sides of an engine, `grpc_transport` the way between them; docs/disaggregation.md has the
protocol."""
