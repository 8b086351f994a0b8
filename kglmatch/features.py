"""The results that travel: `Features` of one image or patch set, `Matches` between two, and their files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import numbers
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import DataError, KeypointError, KGLMatchError, OutputError
from kglmatch.files import atomic_output

Modality = Literal["vis", "ir"]
MODALITIES: tuple[str, ...] = get_args(Modality)

MATCH_FORMATS = (".csv", ".json", ".npz")  # of files of matches

# An array of the library that the patches came in (numpy or torch), or of the backend (maps).
Array = Any
Rows = slice | NDArray[Any] | list[int] | list[bool]


def check_modality(modality: str) -> Modality:
    """Raises `KGLMatchError` unless the modality is "vis" or "ir"; the two are never guessed."""
    if modality not in MODALITIES:
        raise KGLMatchError(f"modality must be one of {MODALITIES}, got {modality!r}")
    return modality  # type: ignore[return-value]


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number by its type: Python's or numpy's integers, but no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number by its type, NaN and infinity included, but no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_keypoints(keypoints: Any, name: str = "keypoints") -> NDArray[np.float32]:
    """Keypoints as (N, 2) float32 xy pixels; of an empty list or array, N = 0.

    Args:
        keypoints: (N, 2) numbers, numpy or torch or lists, or (0,).
        name: what an error calls them.

    Raises:
        KeypointError: another shape or type, or a coordinate that is not finite in float32.
    """
    try:
        array = to_numpy(keypoints)
    except ValueError as error:  # rows of different lengths
        raise KeypointError(f"{name} must be numbers of shape (N, 2), got rows that differ") from error
    if array.shape == (0,):
        array = np.empty((0, 2), np.float32)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iuf":
        raise KeypointError(f"{name} must be numbers of shape (N, 2), got {_summary(array)}")
    with np.errstate(over="ignore"):
        points = array.astype(np.float32, copy=False)
    bad = ~np.isfinite(points).all(axis=1)
    if bad.any():
        row = int(np.argmax(bad))
        raise KeypointError(f"{name} row {row} is {array[row].tolist()}, which is no position in an image")
    return points


def check_size(size: Any) -> tuple[int, int]:
    """The size (width, height) of an image in pixels, as plain integers.

    Raises:
        KGLMatchError: not two whole numbers of at least 1.
    """
    try:
        sides = list(size)
    except TypeError:
        sides = []
    if len(sides) != 2 or not all(is_whole(side) and side >= 1 for side in sides):
        raise KGLMatchError(f"an image size is (width, height) in whole pixels, got {size!r}")
    return int(sides[0]), int(sides[1])


def to_numpy(array: Array) -> NDArray[Any]:
    """A numpy array of a numpy or torch array, on whatever device."""
    if hasattr(array, "detach"):  # a torch tensor; torch itself may not be installed
        array = array.detach().cpu()
        return array.float().numpy() if str(array.dtype) == "torch.bfloat16" else array.numpy()
    if hasattr(array, "numpy"):  # maps of an onnxruntime session
        return array.numpy()
    return np.asarray(array)


def _take(array: Array | None, rows: slice | NDArray[Any]) -> Array | None:
    return None if array is None else array[rows]


def _summary(value: Any) -> str:
    """Shape and type of an array, or the type of anything else."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return type(value).__name__ if dtype is None else f"{tuple(shape or ())} of {dtype}"


@dataclass(frozen=True, eq=False)
class Features:
    """The network's output for N patches of one modality.

    Attributes:
        descriptors: (N, D) float32, L2-normalised; numpy, or torch where the patches were torch.
        modality: "vis" or "ir".
        maps: (N, C, S, S) metric maps on the backend's device, or None if not asked for.
        keypoints: (N, 2) float32 xy pixels of the original image (OpenCV's convention: the centre of
            the first pixel is (0, 0)), or None.
        image_size: (width, height) of that image in pixels, or None.

    Raises:
        KGLMatchError: arrays of other shapes or lengths, keypoints that are not finite, another modality.
    """

    descriptors: Array
    modality: Modality
    maps: Array | None = None
    keypoints: NDArray[np.float32] | None = None
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_modality(self.modality)
        if getattr(self.descriptors, "ndim", None) != 2 or "float" not in str(self.descriptors.dtype):
            raise KGLMatchError(f"descriptors must be floats (N, D), got {_summary(self.descriptors)}")
        if self.keypoints is not None:
            object.__setattr__(self, "keypoints", check_keypoints(self.keypoints))
        if self.image_size is not None:
            object.__setattr__(self, "image_size", check_size(self.image_size))
        if getattr(self.maps, "ndim", None) == 0:
            raise KGLMatchError(f"maps must be floats (N, C, S, S), got {_summary(self.maps)}")
        for name in ("maps", "keypoints"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.descriptors):
                raise KGLMatchError(f"{name} has {len(value)} rows, descriptors has {len(self.descriptors)}")

    def __len__(self) -> int:
        return len(self.descriptors)

    def __getitem__(self, rows: Rows) -> Features:
        """The features of some rows: a slice, a boolean mask (N,) or an array of indices.

        Masks and indices may be numpy or torch, on any device.

        Raises:
            KGLMatchError: rows that do not exist, a mask of another length, a single row.
        """
        chosen = _check_rows(rows, len(self))
        return dataclasses.replace(
            self,
            descriptors=_take(self.descriptors, chosen),
            maps=_take(self.maps, chosen),
            keypoints=_take(self.keypoints, chosen),
        )

    def save(self, path: str | Path) -> None:
        """Writes an `.npz` that `Features.load` reads. Raises `OutputError` where it cannot."""
        arrays: dict[str, Any] = {
            "descriptors": to_numpy(self.descriptors),
            "modality": np.array(self.modality),
        }
        if self.maps is not None:
            arrays["maps"] = to_numpy(self.maps)
        if self.keypoints is not None:
            arrays["keypoints"] = self.keypoints
        if self.image_size is not None:
            arrays["image_size"] = np.array(self.image_size)
        with atomic_output(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # by handle: a name without .npz would get it

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Reads what `save` wrote, as numpy arrays; nothing is unpickled.

        Raises:
            DataError: missing, damaged, or not a file of features: arrays of other shapes or types, or
                values that are not finite.
        """
        arrays = read_npz(path, {"descriptors", "modality"})
        descriptors, maps = arrays["descriptors"], arrays.get("maps")
        try:
            if maps is not None and (maps.ndim != 4 or maps.dtype.kind != "f"):
                raise KGLMatchError(f"maps must be floats (N, C, S, S), got {_summary(maps)}")
            features = cls(
                descriptors.astype(np.float32, copy=False) if descriptors.dtype.kind == "f" else descriptors,
                check_modality(str(arrays["modality"])),
                maps,
                arrays.get("keypoints"),
                arrays.get("image_size"),  # type: ignore[arg-type]
            )
            _check_finite({"descriptors": features.descriptors, "maps": maps})
        except KGLMatchError as error:
            raise DataError(f"{path} holds no features: {error}") from error
        return features


@dataclass(frozen=True, eq=False)
class Matches:
    """K matches between two sets of patches, best first.

    Attributes:
        indices: (K, 2) int64: row in the visible set, row in the ir set.
        scores: (K,) float32 in [0, 1], higher is better.
        distances: (K,) float32 L2 distances of the descriptors, in [0, 2]; NaN where matches were not
            found by descriptors.
        keypoints_vis, keypoints_ir: (K, 2) float32 xy pixels of the original images, or None.
        homography: (3, 3) float64 from visible to ir pixels, or None if not estimated (or not
            supported by enough matches).
        inliers: (K,) bool, which matches agree with the homography, or None.

    Raises:
        KGLMatchError: an array of another shape, length or type.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float32]
    distances: NDArray[np.float32]
    keypoints_vis: NDArray[np.float32] | None = None
    keypoints_ir: NDArray[np.float32] | None = None
    homography: NDArray[np.float64] | None = None
    inliers: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        count = len(self.indices) if getattr(self.indices, "ndim", 0) else 0
        for name, (kinds, row) in _PER_MATCH.items():
            value = getattr(self, name)
            if value is not None or name in _REQUIRED:
                _check_array(name, value, kinds, (count, *row))
        if self.homography is not None:
            _check_array("homography", self.homography, "iuf", (3, 3))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: Rows) -> Matches:
        """Some of the matches: a slice, a boolean mask (K,) or an array of indices.

        Raises:
            KGLMatchError: as for `Features`.
        """
        chosen = _check_rows(rows, len(self))
        taken: dict[str, Any] = {name: _take(getattr(self, name), chosen) for name in _PER_MATCH}
        return dataclasses.replace(self, **taken)

    def filter(self, min_score: float) -> Matches:
        """The matches whose score is at least `min_score`. Raises `KGLMatchError` if that is no number."""
        if not is_number(min_score) or np.isnan(min_score):
            raise KGLMatchError(f"min_score must be a number, got {min_score!r}")
        return self[self.scores >= min_score]

    def save(self, path: str | Path) -> None:
        """Writes the matches as `.npz`, `.json` or `.csv`, by the file's ending.

        A `.csv` holds no homography.

        Raises:
            OutputError: another ending, or a place that cannot be written.
        """
        check_match_format(path)
        suffix = Path(path).suffix.lower()
        with atomic_output(path) as temporary:
            if suffix == ".npz":
                arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
                with temporary.open("wb") as file:
                    np.savez(file, **{name: value for name, value in arrays.items() if value is not None})
            elif suffix == ".json":
                temporary.write_text(json.dumps(matches_to_dict(self), indent=1) + "\n", encoding="utf-8")
            else:
                temporary.write_text(_to_csv(self), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Matches:
        """Reads what `save` wrote, in any of its formats; nothing is unpickled.

        Raises:
            DataError: missing, damaged, or not a file of matches: rows that do not fit each other, values
                that are not finite (but for distances) or scores outside [0, 1].
        """
        suffix = Path(path).suffix.lower()
        if suffix not in MATCH_FORMATS:
            raise DataError(
                f"cannot read matches from {path}: the name must end in one of {', '.join(MATCH_FORMATS)}"
            )
        if suffix == ".npz":
            arrays: dict[str, Any] = dict(read_npz(path, _REQUIRED))
        else:
            arrays = _from_json(path) if suffix == ".json" else _from_csv(path)
        try:
            fields: dict[str, Any] = {
                f.name: _typed(f.name, arrays.get(f.name)) for f in dataclasses.fields(cls)
            }
            matches = cls(**fields)
            _check_finite(
                {f.name: getattr(matches, f.name) for f in dataclasses.fields(cls) if f.name != "distances"}
            )
            if (matches.indices < 0).any():
                raise KGLMatchError(f"indices go down to {matches.indices.min()}, expected rows from 0")
            if ((matches.scores < 0) | (matches.scores > 1)).any():
                low, high = matches.scores.min(), matches.scores.max()
                raise KGLMatchError(f"scores go from {low:g} to {high:g}, expected [0, 1]")
        except KGLMatchError as error:
            raise DataError(f"{path} holds no matches: {error}") from error
        return matches


# The arrays of `Matches` that have a row for each match: kinds of their type, and the shape of a row.
_PER_MATCH: dict[str, tuple[str, tuple[int, ...]]] = {
    "indices": ("iu", (2,)),
    "scores": ("iuf", ()),
    "distances": ("iuf", ()),
    "keypoints_vis": ("iuf", (2,)),
    "keypoints_ir": ("iuf", (2,)),
    "inliers": ("b", ()),
}
_REQUIRED = {"indices", "scores", "distances"}
_KINDS = {"iu": "integers", "iuf": "numbers", "b": "booleans"}
_TYPES = {"indices": np.int64, "homography": np.float64, "inliers": np.bool_}  # of the others: float32


def _check_array(name: str, value: Any, kinds: str, shape: tuple[int, ...]) -> None:
    if not isinstance(value, np.ndarray) or value.shape != shape or value.dtype.kind not in kinds:
        raise KGLMatchError(f"{name} must be {_KINDS[kinds]} of shape {shape}, got {_summary(value)}")


def _check_finite(arrays: dict[str, Any]) -> None:
    for name, values in arrays.items():
        if values is not None and not np.isfinite(values).all():
            raise KGLMatchError(f"there are NaN or infinite values in {name}")


def _typed(name: str, value: Any) -> NDArray[Any] | None:
    """A field of `Matches` as its docstring types it; what is of another kind stays, to be refused."""
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise KGLMatchError(f"{name} has rows of different lengths") from error
    kinds, row = _PER_MATCH.get(name, ("iuf", (3,)))
    if array.shape == (0,):  # of an empty list
        array = np.empty((0, *row), _TYPES.get(name, np.float32))
    with np.errstate(over="ignore"):
        return array.astype(_TYPES.get(name, np.float32), copy=False) if array.dtype.kind in kinds else array


def _check_rows(rows: Rows, length: int) -> slice | NDArray[Any]:
    """Rows as every kind of array takes them: a slice, or a mask or int64 indices on the host."""
    if isinstance(rows, slice):
        try:
            start, stop, step = rows.indices(length)
        except (TypeError, ValueError) as error:
            raise KGLMatchError(f"a slice of rows takes integers, and no step of 0, got {rows}") from error
        return rows if step > 0 else np.arange(start, stop, step)  # torch takes no negative steps
    if str(getattr(rows, "dtype", "")) == "torch.uint8":
        raise KGLMatchError("rows of torch.uint8 may be a mask or indices: use torch.bool or torch.int64")
    try:
        index = to_numpy(rows)
    except ValueError as error:
        raise KGLMatchError("rows must be a slice, a mask (N,) or an array of indices") from error
    if index.ndim != 1:
        raise KGLMatchError("rows must be a slice, a mask (N,) or an array of indices, not a single row")
    if index.size == 0 and index.dtype != bool:
        return index.astype(np.int64)
    if index.dtype == bool and len(index) != length:
        raise KGLMatchError(f"the mask has {len(index)} entries for {length} rows")
    if index.dtype == bool:
        return index
    if not np.issubdtype(index.dtype, np.integer):
        raise KGLMatchError(f"rows must be booleans or integers, got {index.dtype}")
    for row in (index.min(), index.max()):
        if not -length <= int(row) < length:
            raise KGLMatchError(f"there is no row {row}: the set has {length}")
    return index.astype(np.int64, copy=False)  # torch takes uint8 for a mask


def read_npz(path: str | Path, required: set[str]) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz`, by name; nothing is unpickled. Raises `DataError` where one is lacking."""
    try:
        with Path(path).open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise DataError(f"cannot read {path}: it is no .npz file, or a damaged one")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
    except _NPZ_ERRORS as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: {_reason(error)}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives bytes of a member that is no array
            raise DataError(f"cannot read {path}: its member {name!r} is no array")
    if not required <= set(arrays):
        raise DataError(f"{path} lacks {sorted(required - set(arrays))}; it holds {sorted(arrays)}")
    return arrays


# What numpy and zipfile raise about damaged archives.
_NPZ_ERRORS = (
    OSError, ValueError, EOFError, AttributeError, TypeError, KeyError, RuntimeError, MemoryError,
    SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


# --- files of matches -----------------------------------------------------------------------------


def check_match_format(path: str | Path) -> None:
    """Raises `OutputError` unless the file's ending is one of `MATCH_FORMATS`."""
    if Path(path).suffix.lower() not in MATCH_FORMATS:
        raise OutputError(
            f"cannot write matches to {path}: the name must end in one of {', '.join(MATCH_FORMATS)}"
        )


def matches_to_dict(matches: Matches) -> dict[str, Any]:
    """Plain lists and numbers, as in the `.json` file."""
    return {
        f.name: None if (value := getattr(matches, f.name)) is None else value.tolist()
        for f in dataclasses.fields(matches)
    }


# Columns of the `.csv` -> the field that they are of. Those of keypoints and inliers are there if these are.
_COLUMNS = {
    "indices": ("index_vis", "index_ir"),
    "scores": ("score",),
    "distances": ("distance",),
    "keypoints_vis": ("x_vis", "y_vis"),
    "keypoints_ir": ("x_ir", "y_ir"),
    "inliers": ("inlier",),
}


def _to_csv(matches: Matches) -> str:
    columns: dict[str, list[Any]] = {}
    for field, names in _COLUMNS.items():
        values = getattr(matches, field)
        if values is not None:
            values = values.astype(int) if field == "inliers" else values
            columns.update(zip(names, values.reshape(len(matches), len(names)).T.tolist(), strict=True))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def _from_csv(path: str | Path) -> dict[str, Any]:
    """Fields of `Matches`, as lists."""
    try:
        header, *rows = csv.reader(io.StringIO(_text(path)), strict=True)
    except (ValueError, csv.Error) as error:  # no line at all, or quotes that do not close
        raise DataError(f"cannot read {path}: it is no table of matches") from error
    lacking = [name for field in sorted(_REQUIRED) for name in _COLUMNS[field] if name not in header]
    if lacking:
        raise DataError(f"{path} lacks the columns {lacking}; it has {header}")
    readers: dict[str, Callable[[str], Any]] = {
        "indices": int,
        "inliers": {"0": False, "1": True}.__getitem__,
    }
    fields: dict[str, Any] = {}
    for field, names in _COLUMNS.items():
        if not set(names) <= set(header):
            continue
        read = readers.get(field, float)
        places = [header.index(name) for name in names]
        try:
            fields[field] = [[read(row[place]) for place in places] for row in rows]
        except (ValueError, LookupError) as error:
            raise DataError(f"{path}: the columns {list(names)} hold something else in some row") from error
        if len(names) == 1:
            fields[field] = [value for (value,) in fields[field]]
    return fields


def _from_json(path: str | Path) -> dict[str, Any]:
    """Fields of `Matches`, as lists."""
    try:
        fields = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: it is no JSON: {error}") from error
    if not isinstance(fields, dict) or not fields.keys() >= _REQUIRED:
        raise DataError(f"{path} holds no matches: expected an object with {sorted(_REQUIRED)}")
    return fields


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {_reason(error)}") from error
