"""ROC curves as a picture, drawn with Pillow alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kglmatch.evaluation.patches import ROC_GRID, MethodFigures, PatchReport
from kglmatch.images import save_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Drawn larger and scaled down, for Pillow's lines have no soft edges.
_OVERSAMPLING = 3
_WIDTH, _HEIGHT = 1060, 600
_LEFT, _TOP, _RIGHT, _BOTTOM = 96, 64, 820, 528
_TITLE, _TEXT, _SMALL = 21, 16, 14
_INK, _GREY, _GRID, _PAPER = "#1f2328", "#59636e", "#e3e6ea", "#ffffff"
# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#000000")
_OURS = ("descriptor", "metric", "fused")
_DECADES = ((1e-4, "0.01 %"), (1e-3, "0.1 %"), (1e-2, "1 %"), (1e-1, "10 %"), (1.0, "100 %"))


def draw_roc(report: PatchReport) -> NDArray[np.uint8]:
    """The mean ROC curve of each method, false positive rate on a logarithmic axis from 0.01 %.

    Returns:
        (600, 1060, 3) uint8 RGB.
    """
    image = Image.new("RGB", (_WIDTH * _OVERSAMPLING, _HEIGHT * _OVERSAMPLING), _PAPER)
    canvas = _Canvas(image)
    # The axis begins below the lowest curve, at a multiple of 20 %.
    lowest = min(0.8, math.floor(5 * min(figures.roc[0] for figures in report.mean)) / 5)
    _draw_axes(canvas, report, lowest)
    # The model's own curves last, on top.
    order = sorted(range(len(report.mean)), key=lambda i: (report.mean[i].method in _OURS, -i))
    for i in order:
        figures = report.mean[i]
        points = [(_x(f), _y(t, lowest)) for f, t in zip(ROC_GRID, figures.roc, strict=True)]
        canvas.line(points, _COLOURS[i % len(_COLOURS)], 2.6 if figures.method in _OURS else 1.7)
    _draw_legend(canvas, report.mean)
    return np.asarray(image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS))


def save_roc(path: str | Path, report: PatchReport) -> None:
    """Writes `draw_roc`'s picture. Raises `OutputError` where it cannot."""
    save_image(path, draw_roc(report))


class _Canvas:
    """Draws in final pixels on the enlarged picture."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self._draw = ImageDraw.Draw(image)

    def line(self, points: list[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * _OVERSAMPLING), joint="curve")

    def dashes(self, x0: float, x1: float, y: float, colour: str) -> None:
        for x in np.arange(x0, x1, 10):
            self.line([(x, y), (min(x + 6, x1), y)], colour, 1.2)

    def text(self, x: float, y: float, text: str, size: int, colour: str = _INK, anchor: str = "la") -> None:
        self._draw.text((x * _OVERSAMPLING, y * _OVERSAMPLING), text, colour, _font(size), anchor=anchor)

    def width(self, text: str, size: int) -> float:
        return float(self._draw.textlength(text, _font(size)) / _OVERSAMPLING)

    def upright_text(self, x: float, y: float, text: str, size: int) -> None:
        """Text that runs upwards, its middle at (x, y)."""
        width, height = round(self.width(text, size) * _OVERSAMPLING) + 2, 2 * size * _OVERSAMPLING
        label = Image.new("RGB", (width, height), _PAPER)
        middle = (width / 2, height / 2)
        ImageDraw.Draw(label).text(middle, text, _INK, _font(size), anchor="mm")
        corner = round(x * _OVERSAMPLING - height / 2), round(y * _OVERSAMPLING - width / 2)
        self._image.paste(label.rotate(90, expand=True), corner)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _OVERSAMPLING)


def _x(false_positive_rate: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * (1 + math.log10(false_positive_rate) / 4)


def _y(true_positive_rate: float, lowest: float) -> float:
    return _TOP + (_BOTTOM - _TOP) * (1 - true_positive_rate) / (1 - lowest)


def _draw_axes(canvas: _Canvas, report: PatchReport, lowest: float) -> None:
    for decade, label in _DECADES:
        for step in range(2, 10):
            if decade < 1:
                canvas.line([(_x(decade * step), _TOP), (_x(decade * step), _BOTTOM)], "#f3f4f6", 1)
        canvas.line([(_x(decade), _TOP), (_x(decade), _BOTTOM)], _GRID, 1)
        canvas.text(_x(decade), _BOTTOM + 9, label, _SMALL, _GREY, "ma")
    for percent in range(round(100 * lowest), 101, 20 if lowest < 0.6 else 10):
        y = _y(percent / 100, lowest)
        canvas.line([(_LEFT, y), (_RIGHT, y)], _GRID, 1)
        canvas.text(_LEFT - 10, y, f"{percent} %", _SMALL, _GREY, "rm")
    canvas.dashes(_LEFT, _RIGHT, _y(0.95, lowest), _GREY)
    canvas.text(_LEFT - 10, _y(0.95, lowest), "95 %", _SMALL, _GREY, "rm")
    canvas.line([(_LEFT, _TOP), (_LEFT, _BOTTOM), (_RIGHT, _BOTTOM)], _GREY, 1.2)
    names = [subset.name for subset in report.subsets]
    where = names[0] if len(names) == 1 else f"mean of {len(names)} subsets"
    matching = sum(subset.matching for subset in report.subsets)
    others = sum(subset.non_matching for subset in report.subsets)
    canvas.text(_LEFT, 20, f"Patch matching, {where}", _TITLE)
    canvas.text(_RIGHT, 26, f"{matching:,} matching, {others:,} other pairs", _SMALL, _GREY, "ra")
    middle = (_LEFT + _RIGHT) / 2
    canvas.text(middle, _BOTTOM + 36, "non-matching pairs accepted", _TEXT, _INK, "ma")
    canvas.upright_text(24, (_TOP + _BOTTOM) / 2, "matching pairs accepted", _TEXT)


def _draw_legend(canvas: _Canvas, methods: tuple[MethodFigures, ...]) -> None:
    left, right = _RIGHT + 28, _WIDTH - 24
    canvas.text(right, _TOP, "FPR95", _SMALL, _GREY, "ra")
    for i, method in enumerate(methods):
        y = _TOP + 36 + 26 * i
        canvas.line([(left, y), (left + 28, y)], _COLOURS[i % len(_COLOURS)], 3)
        canvas.text(left + 40, y, method.method, _TEXT, _INK, "lm")
        canvas.text(right, y, f"{method.fpr95_percent:.2f} %", _TEXT, _INK, "rm")
