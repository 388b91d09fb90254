"""How parameters are stored: layouts of matrices, and weights of 8 and 4 bits."""
