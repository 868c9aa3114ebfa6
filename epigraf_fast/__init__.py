"""EpiGRAF, trained fast: a patch-wise 3D GAN on tri-planes."""

__version__ = "0.1.0"
