"""A model as tensor operations for AMD GPUs, of which iree-compile makes kernels."""
