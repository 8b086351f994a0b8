"""How far the captures of a flight lie from a rig: residuals, as a table and as a picture."""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kglmatch.batch.captures import Capture, as_captures, choose_reference
from kglmatch.batch.rig import Flight, find_trend, objection, spread
from kglmatch.batch.rig_pool import measure
from kglmatch.batch.rig_results import Residuals, Rig, Trend, trend_to_dict
from kglmatch.errors import DataError, KGLMatchError, OutputError
from kglmatch.files import atomic_output

_COLUMNS = ("capture", "band", "judged", "dx", "dy", "error", "support")
_PICTURES = (".png", ".pdf", ".svg", ".jpg")


@dataclass(frozen=True, eq=False)
class BandCheck:
    """How a flight fits one band of a rig.

    Attributes:
        name: of the band.
        residuals: of the captures.
        num_agreeing: judged captures within the rig's tolerance.
        shift: (2,) pixels of the band, the median of the judged captures' shifts; NaN without any.
        trend: what the displacements follow, or None.
        objection: why the rig does not serve this flight, or None.
    """

    name: str
    residuals: Residuals
    num_agreeing: int
    shift: tuple[float, float]
    trend: Trend | None
    objection: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; NaN becomes None."""

        def number(value: float) -> float | None:
            return round(float(value), 3) if np.isfinite(value) else None

        return {
            "band": self.name,
            "num_captures": len(self.residuals.captures),
            "num_judged": int(self.residuals.judged.sum()),
            "num_agreeing": self.num_agreeing,
            "shift": [number(x) for x in self.shift],
            "spread": number(self.residuals.spread),
            "consistent": number(self.residuals.consistent),
            "trend": None if self.trend is None else trend_to_dict(self.trend),
            "objection": self.objection,
        }


@dataclass(frozen=True, eq=False)
class RigCheck:
    """How a flight fits a rig.

    Attributes:
        bands: of the rig that have a transform.
        tolerance: pixels within which a capture agrees.
        size: (width, height) of the reference.
        problems: captures that could not be used -> why.
    """

    bands: tuple[BandCheck, ...]
    tolerance: float
    size: tuple[int, int]
    problems: dict[str, str]

    @property
    def serves(self) -> bool:
        """Whether the rig serves this flight: every band was judged, and nothing speaks against it."""
        return all(band.residuals.judged.any() and band.objection is None for band in self.bands)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, without the single captures."""
        return {
            "serves": self.serves,
            "tolerance": self.tolerance,
            "bands": [band.to_dict() for band in self.bands],
            "problems": self.problems,
        }

    def save_table(self, path: str | os.PathLike[str]) -> None:
        """Writes a CSV file, one row a capture and band: pixels of the band; empty where not judged."""
        with atomic_output(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(_COLUMNS)
            for band in self.bands:
                found = band.residuals
                for i, name in enumerate(found.captures):
                    judged = bool(found.judged[i])
                    values = (*found.shifts[i], found.errors[i])
                    numbers = [f"{value:.3f}" for value in values] if judged else [""] * 3
                    table.writerow([name, band.name, int(judged), *numbers, f"{found.support[i]:.3f}"])


def check_rig(
    rig: Rig,
    captures: str | os.PathLike[str] | Iterable[Capture | Mapping[str, Any]],
    *,
    max_captures: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> RigCheck:
    """Measures how far the captures of a flight lie from a rig's transforms. Needs no model.

    Args:
        rig: calibrated on this flight, or on another one.
        captures: as for `calibrate_rig`.
        max_captures: captures to use, evenly spread over the flight; None for all.
        workers: threads; None for one a core.
        progress: draw progress bars on a terminal.

    Raises:
        DataError: the captures are of another camera, or lack the reference or every band.
        KGLMatchError: a parameter out of range.
    """
    for name, count in (("max_captures", max_captures), ("workers", workers)):
        if count is not None and count < 1:
            raise KGLMatchError(f"{name} must be 1 or more, got {count}")
    listed = as_captures(captures)
    if max_captures is not None:
        listed = [listed[i] for i in spread(len(listed), max_captures)]
    # A band that a capture of the rig need not have is none of its problems.
    wanted = {rig.reference, *(band.name for band in rig.bands if band.transform is not None)}
    listed = [Capture(c.name, {band: c.bands[band] for band in c.bands if band in wanted}) for c in listed]
    present = sorted({band for capture in listed for band in capture.bands})
    choose_reference(present or ["none"], rig.reference)
    flight = Flight(listed, rig.reference, workers or os.cpu_count() or 1, progress)
    checks = []
    for band in rig.bands:
        if band.transform is None or band.name not in present:
            continue
        for name, size in ((rig.reference, rig.size), (band.name, band.size)):
            if flight.sizes[name] != size:
                found = flight.sizes[name]
                raise DataError(
                    f"the rig is of another camera: band {name} is {found[0]} x {found[1]}, "
                    f"the rig's is {size[0]} x {size[1]}"
                )
        pairs = flight.pairs(rig.reference, band.name)
        residuals = measure(pairs, range(len(pairs)), band.transform)
        trend = find_trend(residuals, flight.moments_of(residuals.captures))
        agreeing = int(residuals.agreeing(rig.tolerance).sum())
        shifts = residuals.shifts[residuals.judged]
        middle = np.median(shifts, axis=0) if len(shifts) else np.full(2, np.nan)
        checks.append(
            BandCheck(
                band.name,
                residuals,
                agreeing,
                (float(middle[0]), float(middle[1])),
                trend,
                objection(residuals, agreeing, trend, rig.tolerance),
            )
        )
    if not checks:
        raise DataError(f"no capture has a band of the rig: {', '.join(sorted(wanted - {rig.reference}))}")
    return RigCheck(tuple(checks), rig.tolerance, rig.size, flight.problems)


def check_picture_name(path: str | os.PathLike[str]) -> None:
    """Raises where `draw_check` would for the name, or without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise KGLMatchError('residuals are drawn by matplotlib: pip install "kglmatch[plot]"')
    if Path(path).suffix.lower() not in _PICTURES:
        raise OutputError(f"cannot draw to {os.fspath(path)}: the name must end in {' or '.join(_PICTURES)}")


def draw_check(check: RigCheck, path: str | os.PathLike[str]) -> None:
    """Draws the residuals of each band over the flight, and what all captures leave over the image.

    Args:
        path: a picture that matplotlib writes: .png, .pdf, .svg or .jpg.

    Raises:
        KGLMatchError: matplotlib is not there.
        OutputError: another ending, or a file that cannot be written.
    """
    check_picture_name(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 * len(check.bands)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(check.bands), 2, squeeze=False, width_ratios=(2.2, 1))
    for (over_time, over_image), band in zip(axes, check.bands, strict=True):
        found = band.residuals
        row = np.arange(len(found.captures))
        for axis, (name, colour) in enumerate((("x", "tab:blue"), ("y", "tab:orange"))):
            over_time.errorbar(
                row[found.judged],
                found.shifts[found.judged, axis],
                found.errors[found.judged],
                fmt=".",
                color=colour,
                elinewidth=0.5,
                label=name,
            )
        over_time.axhspan(-check.tolerance, check.tolerance, color="tab:green", alpha=0.12, zorder=0)
        over_time.set(ylabel=f"band {band.name}: px", title=band.objection or "")
        over_time.legend(loc="upper right")
        known = np.isfinite(found.field).all(axis=1)
        (x, y), (dx, dy) = found.points[known].T, found.field[known].T
        over_image.quiver(x, y, dx, dy, angles="xy", scale_units="xy", scale=0.02, width=0.004)
        longest = float(np.hypot(dx, dy).max()) if len(dx) else 0.0
        over_image.set(
            xlim=(0, check.size[0]),
            ylim=(check.size[1], 0),
            aspect="equal",
            title=f"left by all captures, up to {longest:.2f} px",
        )
    axes[-1][0].set_xlabel("capture")
    with atomic_output(path) as temporary:
        figure.savefig(temporary, dpi=110)
