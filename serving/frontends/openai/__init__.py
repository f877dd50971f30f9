"""OpenAI's API, with what vLLM and Cohere add to it: translates it to calls of the text service."""
