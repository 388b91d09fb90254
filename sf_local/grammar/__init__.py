"""Constrained decoding: which tokens may follow in a text that must match a grammar."""
