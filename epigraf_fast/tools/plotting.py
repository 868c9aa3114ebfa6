"""Figures of matplotlib without a window, for the command-line tools."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import waiting
from .command import check_output, output, require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")


def check_figure(flag: str, path: Path, *, overwrite: bool = False) -> None:
    """Raises UserError where a figure that a flag asks for could not be drawn or not be written under that name."""
    check_output(flag, path, SUFFIXES, overwrite=overwrite)
    require("matplotlib", "matplotlib", "tools")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches."""
    require("matplotlib", "matplotlib", "tools")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Writes a figure, whole or not at all, in a folder that is made if need be."""
    with waiting(f"drawing {path.name}"), output(path) as partial:
        content = io.BytesIO()  # a full disk then is an error of ours, and not of some library under way
        figure.savefig(content, format=path.suffix[1:], **options)
        partial.write_bytes(content.getvalue())
