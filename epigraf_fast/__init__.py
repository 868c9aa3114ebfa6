"""EpiGRAF, trained fast: a patch-wise 3D GAN on tri-planes."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # what Python says while it looks for X of `python -m epigraf_fast.X`
    from .command import begin

    begin()
