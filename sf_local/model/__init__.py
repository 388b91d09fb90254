"""Calls a compiled model: arguments, padding, KV pages, results."""
