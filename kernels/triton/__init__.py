"""Triton kernels for CUDA: the same arithmetic as the torch modules above, fused."""
