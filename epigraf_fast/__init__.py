"""EpiGRAF, trained fast: a patch-wise 3D GAN on tri-planes."""

import os
import sys

__version__ = "0.1.0"

# OpenMP's threads wait for each other by spinning, for milliseconds, in which a processor that several programs share
# does nothing. libgomp, which torch brings, reads this when torch is loaded; `bench.waiting` compares numbers of spins.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if sys.argv[:1] == ["-m"]:  # what Python says while it looks for X of `python -m epigraf_fast.X`
    from .command import begin

    begin()
