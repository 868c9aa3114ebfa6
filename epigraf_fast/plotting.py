"""Figures of matplotlib without a window, for the command-line tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")


def check_path(flag: str, path: Path | None) -> None:
    """Raises UserError where a figure that a flag asks for could not be written under that name."""
    if path is not None and path.suffix not in SUFFIXES:
        raise UserError(f"{flag} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {path}")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed: pip install 'epigraf_fast[tools]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Writes a figure, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, **options)
