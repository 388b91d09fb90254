"""Weights and tokenizers in other people's files, each read as one `Source`."""
