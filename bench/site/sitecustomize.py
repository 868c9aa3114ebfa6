"""With this folder on PYTHONPATH, a checkout needs no installation: `epigraf_fast.kernels` is its folder kernels/.

Python imports this module at its start; the one that it hides is run too.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"


class KernelsFinder(importlib.abc.MetaPathFinder):
    """Asked last: an installed package comes first."""

    def find_spec(self, name, path=None, target=None):
        if name != "epigraf_fast.kernels":
            return None
        return importlib.util.spec_from_file_location(
            name, KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)]
        )


sys.meta_path.append(KernelsFinder())

_hidden = importlib.machinery.PathFinder.find_spec(
    "sitecustomize", [place for place in sys.path if Path(place or ".").resolve() != HERE]
)
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))
