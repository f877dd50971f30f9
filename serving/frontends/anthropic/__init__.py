"""Anthropic's Messages API: what its SDKs and the agents built on them send."""
