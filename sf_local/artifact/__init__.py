"""Compiled models on disk: found, read, checked, and kept in a cache."""
