"""With this folder on PYTHONPATH, a checkout needs no installation: `epigraf_fast.kernels` is its folder kernels/.

Python imports this module at its start; the one that it hides is run too.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class KernelsFinder(importlib.abc.MetaPathFinder):
    """Asked first, and answers only where `epigraf_fast` is this checkout's, not an installed one."""

    def find_spec(self, name, path=None, target=None):
        if name != "epigraf_fast.kernels" or str(ROOT / "epigraf_fast") not in map(os.path.abspath, path or ()):
            return None
        return importlib.util.spec_from_file_location(
            name, ROOT / "kernels" / "__init__.py", submodule_search_locations=[str(ROOT / "kernels")]
        )


sys.meta_path.insert(0, KernelsFinder())

_hidden = importlib.machinery.PathFinder.find_spec(
    "sitecustomize", [place for place in sys.path if Path(place or ".").resolve() != HERE]
)
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))
