"""What the compiled kernels do, counted without a GPU."""
