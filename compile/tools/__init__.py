"""Run by hand: what a GPU's kernels take at least, and the tuning of CPU kernels."""
