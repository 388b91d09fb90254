"""A model as kernels of our own for CPUs: phases of tasks, in MLIR's vector dialect."""
