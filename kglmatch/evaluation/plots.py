"""Reports as pictures, by matplotlib (``pip install "kglmatch[plot]"``): ROC curves, registration errors."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kglmatch.errors import KGLMatchError, OutputError
from kglmatch.evaluation.patches import ROC_GRID, PatchReport
from kglmatch.evaluation.registration import OURS, PIXELS, RegistrationReport
from kglmatch.files import atomic_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".jpg", ".pdf", ".svg")

_NEEDED = 'plots need matplotlib: pip install "kglmatch[plot]"'
_SIZE = (10.6, 6.0)  # inches, of 100 pixels
_INK, _GREY, _GRID = "#1f2328", "#59636e", "#e3e6ea"
# Okabe and Ito's palette, which colour-blind readers can distinguish.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#000000")
_OURS = ("descriptor", "metric", "fused", OURS)


def check_plot(path: str | Path) -> None:
    """Checks before the work that a picture can be drawn and what it is to be.

    Raises:
        KGLMatchError: matplotlib is not installed.
        OutputError: a file name of another format.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise KGLMatchError(_NEEDED)
    if Path(path).suffix.lower() not in FORMATS:
        raise OutputError(f"cannot draw {path}: the name must end in one of {', '.join(FORMATS)}")


def draw_roc(report: PatchReport) -> Figure:
    """The mean ROC curve of each method, false positive rate on a logarithmic axis from 0.01 %.

    Raises:
        KGLMatchError: matplotlib is not installed.
    """
    figure, axes = _figure()
    for i, figures in enumerate(report.mean):
        _line(axes, i, ROC_GRID, 100 * figures.roc, figures.method, f"{figures.fpr95_percent:.2f} %")
    axes.axhline(95, color=_GREY, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([1e-4, 1e-3, 1e-2, 1e-1, 1], ["0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
    # The axis begins below the lowest curve, at a multiple of 20 %.
    lowest = min(80, 20 * math.floor(5 * min(figures.roc[0] for figures in report.mean)))
    axes.set(xlim=(1e-4, 1), ylim=(lowest, 100.5))
    axes.set_xlabel("non-matching pairs accepted")
    axes.set_ylabel("matching pairs accepted, %")
    names = [subset.name for subset in report.subsets]
    matching = sum(subset.matching for subset in report.subsets)
    others = sum(subset.non_matching for subset in report.subsets)
    where = names[0] if len(names) == 1 else f"mean of {len(names)} subsets"
    axes.set_title(f"Patch matching, {where}", loc="left", color=_INK)
    axes.set_title(f"{matching:,} matching, {others:,} other pairs", loc="right", color=_GREY, fontsize=9)
    _legend(axes, "FPR95")
    return figure


def draw_errors(report: RegistrationReport) -> Figure:
    """The share of image pairs registered by each method within an error, from 0.1 to 100 pixels.

    Raises:
        KGLMatchError: matplotlib is not installed.
    """
    figure, axes = _figure()
    pixels = np.logspace(-1, 2, 301)
    for i, method in enumerate(report.methods):
        found = np.sort(report.errors(method))
        share = 100 * np.searchsorted(found, pixels, side="right") / len(found)
        within = f"{100 * report.share(method, PIXELS[1]):.0f} %"
        _line(axes, i, pixels, share, method, within)
    axes.set_xscale("log")
    ticks = (0.1, *PIXELS, 100)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(xlim=(0.1, 100), ylim=(0, 100.5))
    axes.set_xlabel("mean corner error, pixels")
    axes.set_ylabel("image pairs within it, %")
    axes.set_title(f"{report.kind.capitalize()}, {', '.join(report.subsets)}", loc="left", color=_INK)
    axes.set_title(f"{report.pairs:,} image pairs", loc="right", color=_GREY, fontsize=9)
    _legend(axes, f"within {PIXELS[1]} px")
    return figure


def save_plot(path: str | Path, report: PatchReport | RegistrationReport) -> None:
    """Draws a report into a file, whole or not at all.

    Args:
        path: .png (1,060 x 600 pixels), .jpg, .pdf or .svg.

    Raises:
        KGLMatchError, OutputError: as `check_plot`, or the file cannot be written.
    """
    check_plot(path)
    figure = draw_roc(report) if isinstance(report, PatchReport) else draw_errors(report)
    with atomic_output(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _figure() -> tuple[Figure, Axes]:
    """A figure of its own canvas: no window, and nothing that pyplot keeps."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KGLMatchError(_NEEDED) from error
    figure = Figure(_SIZE, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(visible=True, color=_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axes: Axes, i: int, x: np.ndarray, y: np.ndarray, method: str, figure: str) -> None:
    ours = method in _OURS
    # The model's own curves are drawn on top.
    axes.plot(
        x,
        y,
        color=_COLOURS[i % len(_COLOURS)],
        linewidth=2.4 if ours else 1.5,
        zorder=3 if ours else 2,
        label=f"{method}  {figure}",
    )


def _legend(axes: Axes, title: str) -> None:
    axes.legend(
        title=title, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, alignment="left", labelcolor=_INK
    )
