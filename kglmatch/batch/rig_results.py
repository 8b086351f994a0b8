"""What a calibration gives: `Rig`, `RigBand`, and how far each capture lies from it; `rig.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import DataError
from kglmatch.options import TRANSFORMS, TransformKind, __version__
from kglmatch.registration.files import save_json

RigVerdict = Literal["registered", "varies", "doubtful", "failed"]

_FORMAT, _VERSION = "kglmatch-rig", 1
_MAX_PIXELS = 1 << 30  # of a side that a file may name


@dataclass(frozen=True)
class Trend:
    """What the captures' displacements follow.

    Attributes:
        of: "height" (parallax) or "time" (a mount that moves).
        share: of the displacements' variance that it explains, in [0, 1].
        pixels: how far it moves the band over the flight, pixels of the band.
    """

    of: Literal["height", "time"]
    share: float
    pixels: float


@dataclass(frozen=True, eq=False)
class Residuals:
    """How far the captures of one band lie from where a transform takes them.

    Attributes:
        captures: N names.
        shifts: (N, 2) float64 pixels of the band, where the content is found minus where the transform
            takes it; NaN where the capture was not judged.
        errors: (N,) float64 pixels, how far two halves of a capture's windows disagree about its shift.
        support: (N,) float64, mean vote of each half of the windows for the shift that the other half found.
        consistent: share of the clear windows within 1.5 pixels of their capture's own shift; low where
            near and far things lie apart (parallax within the scene), NaN without clear windows.
        points: (G, 2) float64 xy pixels of the reference, the grid of windows.
        field: (G, 2) float64 pixels of the band, the median residual of the captures at each of them, which
            their common transform cannot model (lens distortion); NaN where too few windows are clear.
    """

    captures: tuple[str, ...]
    shifts: NDArray[np.float64]
    errors: NDArray[np.float64]
    support: NDArray[np.float64]
    consistent: float
    points: NDArray[np.float64]
    field: NDArray[np.float64]

    @property
    def judged(self) -> NDArray[np.bool_]:
        """(N,) which captures hold enough structure to be judged."""
        return ~np.isnan(self.shifts[:, 0])

    @property
    def lengths(self) -> NDArray[np.float64]:
        """(N,) pixels, of the shifts; NaN where a capture was not judged."""
        return np.linalg.norm(self.shifts, axis=1)

    @property
    def spread(self) -> float:
        """Pixels: root mean square of the judged shifts about their median; NaN without any."""
        shifts = self.shifts[self.judged]
        if not len(shifts):
            return float("nan")
        return float(np.sqrt(np.square(shifts - np.median(shifts, axis=0)).sum(axis=1).mean()))

    def agreeing(self, tolerance: float) -> NDArray[np.bool_]:
        """(N,) which captures the transform serves to within `tolerance` pixels and their own error."""
        with np.errstate(invalid="ignore"):
            within: NDArray[np.bool_] = np.less_equal(
                self.lengths, tolerance + self.errors.clip(0, tolerance)
            )
        return within


@dataclass(frozen=True, eq=False)
class RigBand:
    """One band of a rig, as the captures of a flight show it.

    Attributes:
        name: of the band.
        size: (width, height) pixels.
        verdict: "registered"; "varies" (one transform does not serve this flight), "doubtful" or "failed".
        confidence: in [0, 1], that the transform is right for most captures.
        transform: (3, 3) float64 from reference to band pixels, or None if the verdict is "failed".
        kind: what kind of transform it is, or None.
        via: band through which it was registered, or None for a direct registration.
        reason: one line on the verdict.
        num_captures: captures that have this band and the reference.
        num_judged: captures that hold enough structure to be judged.
        num_agreeing: judged captures within the tolerance.
        spread: pixels, see `Residuals.spread`.
        support: mean vote of windows for transforms that were fitted without them, of the judged captures.
        agreement: mean of `Registration.agreement` over some captures.
        num_matches: keypoint matches of all captures together that agree; 0 where none were looked for.
        consistent: see `Residuals.consistent`.
        trend: what the displacements follow, or None.
        residuals: of the captures, or None where the rig was read from a file.
    """

    name: str
    size: tuple[int, int]
    verdict: RigVerdict
    confidence: float
    transform: NDArray[np.float64] | None
    kind: TransformKind | None
    via: str | None
    reason: str
    num_captures: int
    num_judged: int
    num_agreeing: int
    spread: float
    support: float
    agreement: float
    num_matches: int
    consistent: float
    trend: Trend | None = None
    residuals: Residuals | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, without the single captures; NaN becomes None."""
        return {
            "band": self.name,
            "size": list(self.size),
            "verdict": self.verdict,
            "confidence": round(self.confidence, 4),
            "kind": self.kind,
            "transform": None if self.transform is None else self.transform.tolist(),
            "via": self.via,
            "reason": self.reason,
            "num_captures": self.num_captures,
            "num_judged": self.num_judged,
            "num_agreeing": self.num_agreeing,
            "spread": _number(self.spread, 3),
            "support": round(self.support, 4),
            "agreement": round(self.agreement, 4),
            "num_matches": self.num_matches,
            "consistent": _number(self.consistent, 3),
            "trend": None if self.trend is None else trend_to_dict(self.trend),
        }


@dataclass(frozen=True, eq=False)
class Rig:
    """The bands of a rig, with their transforms from its reference.

    Attributes:
        reference: name of the band that the others are registered to.
        size: (width, height) of the reference, pixels.
        bands: the other bands, in natural order.
        tolerance: pixels within which a capture agrees.
        model: that judged.
        num_captures: captures that the calibration used.
        problems: capture or file -> why it was not used.
    """

    reference: str
    size: tuple[int, int]
    bands: tuple[RigBand, ...]
    tolerance: float
    model: str
    num_captures: int
    problems: dict[str, str]

    def __getitem__(self, name: str) -> RigBand:
        """The band of this name.

        Raises:
            DataError: the rig has no such band.
        """
        for band in self.bands:
            if band.name == name:
                return band
        raise DataError(f"the rig has no band {name!r}; it has {', '.join(b.name for b in self.bands)}")

    @property
    def serves(self) -> bool:
        """Whether one transform a band serves the flight, for every band."""
        return all(band.verdict == "registered" for band in self.bands)

    def to_dict(self) -> dict[str, Any]:
        """What `save` writes, as plain lists and numbers."""
        return {
            "format": _FORMAT,
            "format_version": _VERSION,
            "kglmatch_version": __version__,
            "model": self.model,
            "reference": {"band": self.reference, "size": list(self.size)},
            "tolerance": self.tolerance,
            "num_captures": self.num_captures,
            "bands": [band.to_dict() for band in self.bands],
            "problems": self.problems,
        }

    def digest(self) -> str:
        """A hash of what a rig says, whatever version of kglmatch read it."""
        said = {key: value for key, value in self.to_dict().items() if key != "kglmatch_version"}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `rig.json`. Raises `OutputError` where it cannot."""
        save_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rig:
        """Reads what `save` wrote.

        Raises:
            DataError: no such file, or one that holds no rig.
        """
        name = os.fspath(path)
        value = read_json(name)
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise DataError(f"cannot read {name}: it is no rig; `kglmatch rig calibrate` writes them")
        if value.get("format_version") != _VERSION:
            raise DataError(
                f"cannot read {name}: a rig of format {value.get('format_version')!r}, expected {_VERSION}"
            )
        try:
            return cls(
                reference=str(value["reference"]["band"]),
                size=read_size(value["reference"]["size"]),
                bands=tuple(_band(band) for band in value["bands"]),
                tolerance=float(value["tolerance"]),
                model=str(value["model"]),
                num_captures=int(value["num_captures"]),
                problems={str(key): str(text) for key, text in value["problems"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"cannot read {name}: a damaged rig: {what}") from error


def read_json(name: str) -> Any:
    """What a JSON file holds. Raises `DataError` where it cannot be read."""
    try:
        return json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {name}: no JSON ({error})") from error


def read_transform(value: Any) -> NDArray[np.float64]:
    """A (3, 3) transform from plain lists. Raises `DataError` for anything else."""
    try:
        transform = np.array(value, np.float64)
    except (TypeError, ValueError):
        transform = np.empty(0)
    if transform.shape != (3, 3) or not np.isfinite(transform).all() or abs(np.linalg.det(transform)) < 1e-12:
        raise DataError("expected a transform of 3 x 3 finite numbers that can be inverted")
    return transform


def read_size(value: Any) -> tuple[int, int]:
    """A (width, height) from plain lists. Raises `DataError` for anything else."""
    whole = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(x) is int for x in value)
    if not whole or not all(0 < x < _MAX_PIXELS for x in value):
        raise DataError(f"expected a size of two whole numbers of pixels, got {value!r}")
    return value[0], value[1]


def trend_to_dict(trend: Trend) -> dict[str, Any]:
    """Plain numbers."""
    return {"of": trend.of, "share": round(trend.share, 3), "pixels": round(trend.pixels, 3)}


def common_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size that most images have."""
    return max(dict.fromkeys(sizes), key=list(sizes).count)


def _band(value: dict[str, Any]) -> RigBand:
    verdict, kind = value["verdict"], value["kind"]
    if verdict not in get_args(RigVerdict) or kind not in (None, *TRANSFORMS):
        raise DataError(f"unknown verdict {verdict!r} or kind {kind!r}")
    transform = None if value["transform"] is None else read_transform(value["transform"])
    if (transform is None) != (verdict == "failed"):
        raise DataError(f"a band that is {verdict} has {'no' if transform is None else 'a'} transform")
    trend = value["trend"]
    if trend is not None and trend["of"] not in ("height", "time"):
        raise DataError(f"unknown trend {trend['of']!r}")
    return RigBand(
        name=str(value["band"]),
        size=read_size(value["size"]),
        verdict=cast(RigVerdict, verdict),
        confidence=float(value["confidence"]),
        transform=transform,
        kind=kind,
        via=None if value["via"] is None else str(value["via"]),
        reason=str(value["reason"]),
        num_captures=int(value["num_captures"]),
        num_judged=int(value["num_judged"]),
        num_agreeing=int(value["num_agreeing"]),
        spread=_nan(value["spread"]),
        support=float(value["support"]),
        agreement=float(value["agreement"]),
        num_matches=int(value["num_matches"]),
        consistent=_nan(value["consistent"]),
        trend=None if trend is None else Trend(trend["of"], float(trend["share"]), float(trend["pixels"])),
    )


def _number(value: float, digits: int) -> float | None:
    return None if not np.isfinite(value) else round(float(value), digits)


def _nan(value: Any) -> float:
    return float("nan") if value is None else float(value)
