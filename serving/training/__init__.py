"""Fine-tuning: examples to rows of tokens, a network's parameters to what is trained of them, steps, checkpoints, and what comes
out. It reads models and texts as serving does and knows nothing of engines."""
