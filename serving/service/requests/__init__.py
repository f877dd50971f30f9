"""What is asked: inputs and their limits, from messages and text to the token ids that the engine runs."""
