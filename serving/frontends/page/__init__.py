"""The playground: a page in plain files that speaks OpenAI's API."""
