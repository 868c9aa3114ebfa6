"""Faults put into the compiled kernels, and how many are found."""
