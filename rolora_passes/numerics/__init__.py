"""Arithmetic on plain tensors: grids, GPTQ, Hadamard transforms, orthogonal matrices."""
