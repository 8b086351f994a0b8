"""`DisplacementField`: a smooth displacement of an image's pixels, as a cubic B-spline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import DataError
from kglmatch.resampling import Interpolation, warp_image

_INVERSE_STEPS = 50
_INVERSE_EXACT = 1e-4  # pixels
_ORDER = 3  # control points beyond the number of cells


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """Displacements of an image's pixels: a uniform cubic B-spline (Rueckert et al., IEEE TMI 1999).

    In a registration with a transform H, the visible pixel x shows what the other image shows at
    H(x + u(x)), where u is the field.

    Attributes:
        control: (R, C, 2) float64 xy pixels, the control displacements of a grid of R - 3 by C - 3 equal
            cells over the image.
        size: (width, height) of the image in pixels.
    """

    control: NDArray[np.float64]
    size: tuple[int, int]

    @classmethod
    def zero(cls, size: tuple[int, int], cells: tuple[int, int]) -> DisplacementField:
        """The field without displacement, of (columns, rows) cells."""
        return cls(np.zeros((cells[1] + _ORDER, cells[0] + _ORDER, 2)), size)

    @property
    def cells(self) -> tuple[int, int]:
        """Number of cells (columns, rows)."""
        return self.control.shape[1] - _ORDER, self.control.shape[0] - _ORDER

    @property
    def spacing(self) -> tuple[float, float]:
        """Width and height of a cell in pixels."""
        return self.size[0] / self.cells[0], self.size[1] / self.cells[1]

    def at(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Displacements (N, 2) at xy pixels (N, 2); beyond the image, those of its border."""
        return self.basis(points) @ self.control.reshape(-1, 2)

    def basis(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Weights (N, R * C) of the control displacements at xy pixels (N, 2)."""
        across, down = (self._weights(axis, points[:, axis]) for axis in (0, 1))
        return (down[:, :, None] * across[:, None, :]).reshape(len(points), down.shape[1] * across.shape[1])

    def on_grid(self, columns: NDArray[np.floating], rows: NDArray[np.floating]) -> NDArray[np.float32]:
        """Displacements (h, w, 2) at every crossing of h rows and w columns, in pixels."""
        across = self._weights(0, columns).astype(np.float32)
        down = self._weights(1, rows).astype(np.float32)
        out = np.empty((len(rows), len(columns), 2), np.float32)
        for axis in (0, 1):
            out[..., axis] = down @ self.control[..., axis].astype(np.float32) @ across.T
        return out

    def dense(self, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """Displacements (height, width, 2) of every pixel.

        Args:
            size: (width, height) of a resized copy of the image, in whose pixels they are; None for the
                image's own.
        """
        field = self if size is None else self.resized(size)
        return field.on_grid(*(np.arange(side, dtype=np.float64) for side in field.size))

    def resized(self, size: tuple[int, int]) -> DisplacementField:
        """The field of a resized copy of the image, (width, height), in that copy's pixels."""
        factor = np.array([size[0] / self.size[0], size[1] / self.size[1]])
        return DisplacementField(self.control * factor, size)

    def apply(
        self, image: NDArray[Any], *, nodata: float = 0, interpolation: Interpolation | None = None
    ) -> NDArray[Any]:
        """Warps an image that the global transform has warped onto the visible one already.

        `Registration.warp` applies both in one step, which interpolates once.

        Args:
            image: (H, W) or (H, W, C), of the field's size or that in another resolution.
            nodata, interpolation: as for `kglmatch.resampling.warp_image`.

        Returns:
            of the image's shape and type: at x, what the image shows at x + u(x).
        """
        size = image.shape[1], image.shape[0]
        return warp_image(
            image,
            np.eye(3),
            size,
            nodata=nodata,
            interpolation=interpolation,
            displacement=self.resized(size).on_grid,
        )

    def inverse_at(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Where the field takes to these points: (N, 2) x with x + u(x) = the points (N, 2), in pixels."""
        found = np.asarray(points, np.float64).copy()
        for _ in range(_INVERSE_STEPS):
            off = points - found - self.at(found)
            if not len(off) or np.abs(off).max() < _INVERSE_EXACT:
                break
            # Newton's step; the Jacobian of a field that does not fold can be inverted.
            found += np.linalg.solve(self.jacobian_at(found), off[..., None])[..., 0]
        return found

    def largest(self) -> float:
        """Length of the largest displacement in pixels, at eight places a cell each way."""
        axes = (np.linspace(-0.5, n - 0.5, 8 * c + 1) for n, c in zip(self.size, self.cells, strict=True))
        return float(np.linalg.norm(self.on_grid(*axes), axis=2).max())

    def jacobian_at(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """(N, 2, 2), how x + u(x) changes with x at xy pixels (N, 2)."""
        values, slopes = zip(
            *((self._weights(a, points[:, a]), self._weights(a, points[:, a], slope=True)) for a in (0, 1)),
            strict=True,
        )
        by_x = np.einsum("nr,rca,nc->na", values[1], self.control, slopes[0], optimize=True)
        by_y = np.einsum("nr,rca,nc->na", slopes[1], self.control, values[0], optimize=True)
        return np.stack([by_x, by_y], axis=2) + np.eye(2)

    def folding(self) -> tuple[float, float]:
        """Smallest and largest determinant of the Jacobian of x + u(x), at eight places a cell each way.

        Below 0 the field folds; 1 is no change of area.
        """
        axes = []
        for axis in (0, 1):
            count = 8 * self.cells[axis] + 1
            at = np.linspace(-0.5, self.size[axis] - 0.5, count)
            axes.append((self._weights(axis, at), self._weights(axis, at, slope=True)))
        (across, slope_x), (down, slope_y) = axes
        xx, yx = (down @ self.control[..., a] @ slope_x.T for a in (0, 1))
        xy, yy = (slope_y @ self.control[..., a] @ across.T for a in (0, 1))
        determinant = (1 + xx) * (1 + yy) - xy * yx
        return float(determinant.min()), float(determinant.max())

    def _weights(self, axis: int, at: NDArray[np.floating], *, slope: bool = False) -> NDArray[np.float64]:
        """Weights (N, control points) of one axis at pixels (N,), or how they change with a pixel."""
        cells = self.cells[axis]
        t = np.clip((np.asarray(at, np.float64) + 0.5) * (cells / self.size[axis]), 0, cells)
        first = np.minimum(t.astype(np.int64), cells - 1)
        s = t - first
        if slope:
            r = 1 - s
            values = np.stack([-r * r, s * (3 * s - 4), 1 + s * (2 - 3 * s), s * s], axis=1) / 2
            values *= cells / self.size[axis]
        else:
            r = 1 - s
            values = np.stack(
                [r**3, (3 * s - 6) * s * s + 4, ((3 - 3 * s) * s + 3) * s + 1, s**3], axis=1
            ) / 6  # fmt: skip
        weights = np.zeros((len(t), cells + _ORDER))
        rows = np.arange(len(t))
        for k in range(_ORDER + 1):
            weights[rows, first + k] = values[:, k]
        return weights

    # --- files --------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {"size": list(self.size), "control": self.control.tolist()}

    @classmethod
    def from_dict(cls, value: Any) -> DisplacementField:
        """The field that `to_dict` gave. Raises `DataError` for anything else."""
        try:
            control = np.array(value["control"], np.float64)
            width, height = value["size"]
        except (TypeError, ValueError, KeyError):
            raise DataError("a displacement field needs its size and its control displacements") from None
        if control.ndim != 3 or control.shape[2] != 2 or min(control.shape[:2]) <= _ORDER:
            raise DataError(
                f"control displacements must be (R, C, 2), 4 or more each way, got {control.shape}"
            )
        if not np.isfinite(control).all():
            raise DataError("control displacements must be finite")
        if not all(type(side) is int and side > 0 for side in (width, height)):
            raise DataError(
                f"the size of a displacement field must be two whole numbers, got {value['size']}"
            )
        return cls(control, (width, height))


@dataclass(frozen=True, eq=False)
class LocalCorrection:
    """What the images say about the displacement that a global transform leaves over.

    Attributes:
        field: to be applied before the global transform, or None where it is refused.
        reason: why it is refused; empty where it is not.
        points: (P, 2) xy pixels of the visible image, the centres of the windows that were compared.
        displacement: (P, 2) visible pixels, where the ir content of each window was found minus where the
            global transform places it.
        certainty: (P,) in [0, 1].
        gain: mean rise of the correlation of windows that the fit did not see, over the global transform.
        significance: that gain in standard errors.
    """

    field: DisplacementField | None
    reason: str
    points: NDArray[np.float64]
    displacement: NDArray[np.float64]
    certainty: NDArray[np.float64]
    gain: float
    significance: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the single windows."""
        return {
            "applied": self.field is not None,
            "reason": self.reason or None,
            "windows": len(self.points),
            "gain": round(self.gain, 4),
            "significance": round(self.significance, 2),
            "largest": None if self.field is None else round(self.field.largest(), 3),
            "field": None if self.field is None else self.field.to_dict(),
        }
