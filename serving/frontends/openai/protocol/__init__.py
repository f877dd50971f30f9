"""Requests and replies of each endpoint as pydantic models: OpenAI's fields plus the extras that vLLM's users know."""
