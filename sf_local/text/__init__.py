"""Text to tokens and back, and conversations to prompts. Knows nothing of models or requests."""
