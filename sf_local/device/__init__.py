"""Devices: which there are, an open one with its threads, and the host's memory."""
