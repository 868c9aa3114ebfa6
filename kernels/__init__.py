"""Triton kernels and their launchers, one module per op. Imported as `epigraf_fast.kernels`."""

if __name__ != "epigraf_fast.kernels":
    raise ImportError(f"{__name__}: this package is installed as epigraf_fast.kernels; import that (pip install -e .)")
