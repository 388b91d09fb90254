"""Writes MLIR as text: values, tensor operations, and the ABI. Knows nothing of models."""
