"""/v1/responses and /v1/conversations: run, streamed, and kept where the server has a store."""
