"""Registers, spills and instructions of the compiled kernels, without a GPU."""
