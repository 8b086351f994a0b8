"""The results that travel: `Features` of one image or patch set, `Matches` between two, and their files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kglmatch.errors import DataError, KGLMatchError, OutputError
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


def to_numpy(array: Array) -> NDArray[Any]:
    """A numpy array of a numpy or torch array, wherever it lies."""
    if hasattr(array, "detach"):  # a torch tensor; torch itself may not be installed
        array = array.detach().cpu()
        return array.float().numpy() if str(array.dtype) == "torch.bfloat16" else array.numpy()
    if hasattr(array, "numpy"):  # maps of an onnxruntime session
        return array.numpy()
    return np.asarray(array)


def _take(array: Array | None, rows: Rows) -> Array | None:
    return None if array is None else array[rows]


@dataclass(frozen=True, eq=False)
class Features:
    """What the network knows about N patches of one modality.

    Attributes:
        descriptors: (N, D) float32, L2-normalised; numpy, or torch where the patches were torch.
        modality: "vis" or "ir".
        maps: (N, 256, S, S) metric maps on the backend's device, or None if not asked for.
        keypoints: (N, 2) float32 xy pixels of the original image (OpenCV's convention: the centre of
            the first pixel is (0, 0)), or None.
        image_size: (width, height) of that image in pixels, or None.
    """

    descriptors: Array
    modality: Modality
    maps: Array | None = None
    keypoints: NDArray[np.float32] | None = None
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_modality(self.modality)
        for name in ("maps", "keypoints"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.descriptors):
                raise KGLMatchError(f"{name} has {len(value)} rows, descriptors has {len(self.descriptors)}")

    def __len__(self) -> int:
        return len(self.descriptors)

    def __getitem__(self, rows: Rows) -> Features:
        """The features of some rows: a slice, a boolean mask (N,) or an array of indices."""
        rows = _check_rows(rows, len(self))
        return dataclasses.replace(
            self,
            descriptors=_take(self.descriptors, rows),
            maps=_take(self.maps, rows),
            keypoints=_take(self.keypoints, rows),
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
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Reads what `save` wrote, as numpy arrays; nothing is unpickled.

        Raises:
            DataError: missing, damaged, or not a file of features.
        """
        arrays = read_npz(path, {"descriptors", "modality"})
        size = arrays.get("image_size")
        return cls(
            arrays["descriptors"],
            check_modality(str(arrays["modality"])),
            arrays.get("maps"),
            arrays.get("keypoints"),
            None if size is None else (int(size[0]), int(size[1])),
        )


@dataclass(frozen=True, eq=False)
class Matches:
    """K matches between two sets of patches, best first.

    Attributes:
        indices: (K, 2) int64: row in the visible set, row in the ir set.
        scores: (K,) float32 in [0, 1], higher is better.
        distances: (K,) float32 L2 distances of the descriptors, in [0, 2].
        keypoints_vis, keypoints_ir: (K, 2) float32 xy pixels of the original images, or None.
        homography: (3, 3) float64 from visible to ir pixels, or None if not estimated (or not
            supported by enough matches).
        inliers: (K,) bool, which matches agree with the homography, or None.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float32]
    distances: NDArray[np.float32]
    keypoints_vis: NDArray[np.float32] | None = None
    keypoints_ir: NDArray[np.float32] | None = None
    homography: NDArray[np.float64] | None = None
    inliers: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: Rows) -> Matches:
        """Some of the matches: a slice, a boolean mask (K,) or an array of indices."""
        rows = _check_rows(rows, len(self))
        per_row = ("indices", "scores", "distances", "keypoints_vis", "keypoints_ir", "inliers")
        taken: dict[str, Any] = {name: _take(getattr(self, name), rows) for name in per_row}
        return dataclasses.replace(self, **taken)

    def filter(self, min_score: float) -> Matches:
        """The matches whose score is at least `min_score`."""
        return self[self.scores >= min_score]

    def save(self, path: str | Path) -> None:
        """Writes the matches as `.npz`, `.json` or `.csv`, by the file's ending.

        Raises:
            OutputError: another ending, or a place that cannot be written.
        """
        _save_matches(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Matches:
        """Reads an `.npz` that `save` wrote. Raises `DataError` where it cannot."""
        arrays = read_npz(path, {"indices", "scores", "distances"})
        return cls(**{f.name: arrays.get(f.name) for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _check_rows(rows: Rows, length: int) -> Rows:
    if isinstance(rows, slice):
        return rows
    index = np.asarray(rows)
    if index.ndim != 1:
        raise KGLMatchError("rows must be a slice, a mask (N,) or an array of indices, not a single row")
    if index.size == 0 and index.dtype != bool:
        return index.astype(np.int64)
    if index.dtype == bool and len(index) != length:
        raise KGLMatchError(f"the mask has {len(index)} entries for {length} rows")
    if index.dtype != bool and not np.issubdtype(index.dtype, np.integer):
        raise KGLMatchError(f"rows must be booleans or integers, got {index.dtype}")
    return index


def read_npz(path: str | Path, required: set[str]) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz`, by name; nothing is unpickled. Raises `DataError` where one is lacking."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}") from error
    if not required <= set(arrays):
        raise DataError(f"{path} lacks {sorted(required - set(arrays))}; it holds {sorted(arrays)}")
    return arrays


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


def _csv(matches: Matches) -> str:
    columns: dict[str, np.ndarray] = {
        "index_vis": matches.indices[:, 0],
        "index_ir": matches.indices[:, 1],
        "score": matches.scores,
        "distance": matches.distances,
    }
    for name, points in (("vis", matches.keypoints_vis), ("ir", matches.keypoints_ir)):
        if points is not None:
            columns[f"x_{name}"], columns[f"y_{name}"] = points[:, 0], points[:, 1]
    if matches.inliers is not None:
        columns["inlier"] = matches.inliers.astype(int)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    return text.getvalue()


def _save_matches(path: str | Path, matches: Matches) -> None:
    """Writes matches by the file's ending. Raises `OutputError` where it cannot."""
    check_match_format(path)
    suffix = Path(path).suffix.lower()
    with atomic_output(path) as temporary:
        if suffix == ".npz":
            arrays = {f.name: getattr(matches, f.name) for f in dataclasses.fields(matches)}
            with temporary.open("wb") as file:
                np.savez(file, **{name: value for name, value in arrays.items() if value is not None})
        elif suffix == ".json":
            temporary.write_text(json.dumps(matches_to_dict(matches), indent=1) + "\n", encoding="utf-8")
        else:
            temporary.write_text(_csv(matches), encoding="utf-8")
