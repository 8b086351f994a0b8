"""The captures of a flight: which files show one moment in several bands, found by how they are named."""

from __future__ import annotations

import csv
import os
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from kglmatch.errors import DataError

EXTENSIONS = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".webp")
LISTS = (".csv",)

# Where none is given, the one that finds the most captures of the fewest bands.
_PATTERNS = ("{capture}_{band}", "{band}/{capture}", "{capture}/{band}")
_FIELD = re.compile(r"\{(capture|band)\}")
_COUNTER = re.compile(r"0\d\d+|\d{4,}")  # numbers captures, not bands

_header_lock = threading.Lock()

_EXIF, _GPS = 0x8769, 0x8825
_TAKEN, _FRACTION, _CHANGED = 0x9003, 0x9291, 0x0132
_ALTITUDE_REFERENCE, _ALTITUDE = 5, 6
_XMP_TAG = 700
# Above the ground, or above the place of take-off, as drones write it.
_XMP_HEIGHT = re.compile(
    rb"(?:RelativeAltitude|AboveGroundAltitude)(?:=\"|>|='|[^>]*>)\s*([+-]?\d+(?:\.\d+)?)", re.IGNORECASE
)


@dataclass(frozen=True)
class Capture:
    """One moment in several bands.

    Attributes:
        name: of the capture; may hold slashes where captures are in folders.
        bands: band -> image: a path, or whatever `kglmatch.load_image` takes.
    """

    name: str
    bands: Mapping[str, Any]


@dataclass(frozen=True)
class Moment:
    """When and from where a capture was taken, as its file says.

    Attributes:
        time: seconds since 1970, or None.
        height: metres, or None.
        above_ground: the height is above the ground or the place of take-off, not above the sea.
    """

    time: float | None = None
    height: float | None = None
    above_ground: bool = False


def find_captures(source: str | os.PathLike[str], pattern: str | None = None) -> list[Capture]:
    """The captures in a folder, or in a list.

    Args:
        source: a folder, or a CSV file with a column "capture" and one column a band, which hold paths
            relative to the file; an empty cell is a band that is missing.
        pattern: how files in the folder are named: "{capture}_{band}.tif", "{band}/{capture}.tif",
            "{capture}/{band}.tif" or the like; the capture may lie in folders of its own. None takes
            the one of these that finds the most captures of the fewest bands, with any image extension:
            `IMG_0001_1.tif` is capture IMG_0001, band 1.

    Returns:
        captures in the natural order of their names (2 before 10), bands likewise.

    Raises:
        DataError: no such folder, no captures of two bands or more, a pattern that is none, or a list
            that cannot be read.
    """
    path = Path(source)
    if path.suffix.lower() in LISTS:
        return _read_list(path)
    if not path.is_dir():
        raise DataError(f"cannot read captures: {path} is neither a folder nor a {' or '.join(LISTS)} file")
    files = sorted(file for file in _image_files(path))
    if pattern is not None:
        if not (found := _matching(path, files, pattern)):
            raise DataError(f"no captures of two bands or more in {path} are named {pattern}")
        return found
    possible = [
        found
        for candidate in _PATTERNS
        if (found := _matching(path, files, candidate))
        and not any(map(_COUNTER.fullmatch, band_names(found)))
    ]
    if possible:
        # A flight has more captures than bands.
        return min(possible, key=lambda found: len(band_names(found)) / len(found))
    raise DataError(
        f"no captures of two bands or more in {path}: expected files named CAPTURE_BAND, such as "
        'IMG_0001_1.tif, or a folder a band; say otherwise by a pattern such as "{capture}-{band}.tif"'
    )


def as_captures(captures: str | os.PathLike[str] | Iterable[Capture | Mapping[str, Any]]) -> list[Capture]:
    """Captures from whatever describes them: a folder, a list file, or captures as they are.

    Args:
        captures: as for `find_captures`; or `Capture`s, or mappings of bands to images, which are named by
            their position.

    Raises:
        DataError: as for `find_captures`, two captures of one name, or a name that leads out of a folder.
    """
    if isinstance(captures, (str, os.PathLike)):
        return find_captures(captures)
    listed = [
        item if isinstance(item, Capture) else Capture(f"{i:04}", {str(band): v for band, v in item.items()})
        for i, item in enumerate(captures)
    ]
    names = [capture.name for capture in listed]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"two captures are named {twice}")
    for name in names:
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"a capture cannot be named {name!r}: outputs are named by it")
    return listed


def band_names(captures: Sequence[Capture]) -> list[str]:
    """Every band that any capture has, in natural order."""
    return sorted({band for capture in captures for band in capture.bands}, key=natural_order)


def choose_reference(bands: Sequence[str], reference: str | None = None) -> str:
    """The band that the others are registered to: as asked for, else "1", else the first.

    Raises:
        DataError: there is no such band.
    """
    if reference is None:
        return "1" if "1" in bands else bands[0]
    if reference not in bands:
        raise DataError(f"there is no band {reference!r} to refer to; the captures have {', '.join(bands)}")
    return reference


def natural_order(name: str) -> tuple[Any, ...]:
    """A key that sorts "2" before "10"."""
    return tuple(
        (0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)
    )


def read_moment(image: Any) -> Moment:
    """When and from where an image was taken, from EXIF and XMP; empty where it says nothing.

    Args:
        image: a path; anything else has no metadata.
    """
    if not isinstance(image, (str, os.PathLike)):
        return Moment()
    try:
        with opened_header(image) as opened:
            exif = opened.getexif()
            details, gps = exif.get_ifd(_EXIF), exif.get_ifd(_GPS)
            xmp = opened.info.get("xmp") or exif.get(_XMP_TAG) or b""
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, UnidentifiedImageError):
        return Moment()  # read as an image, it will say what is wrong with it
    time = _seconds(details.get(_TAKEN) or exif.get(_CHANGED), details.get(_FRACTION))
    xmp = xmp if isinstance(xmp, bytes) else str(xmp).encode("utf-8", "replace")
    height = _XMP_HEIGHT.search(xmp)
    if height is not None:
        return Moment(time, float(height[1]), True)
    try:
        altitude = float(gps[_ALTITUDE])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return Moment(time)
    below = gps.get(_ALTITUDE_REFERENCE) in (1, b"\x01")
    return Moment(time, -altitude if below else altitude) if abs(altitude) < 1e6 else Moment(time)


@contextmanager
def opened_header(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """An image file, opened by Pillow for its header alone, without its warnings about damaged metadata."""
    # The filters of warnings belong to the process.
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            yield image


def _seconds(text: Any, fraction: Any) -> float | None:
    try:
        moment = datetime.strptime(str(text).strip("\0 "), "%Y:%m:%d %H:%M:%S").replace(tzinfo=UTC)
    except ValueError:
        return None
    digits = re.sub(r"\D", "", str(fraction or ""))
    return moment.timestamp() + (float(f"0.{digits}") if digits else 0.0)


def _image_files(folder: Path) -> Iterator[str]:
    """Image files below a folder as relative paths with slashes; hidden ones are left out."""
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if path.suffix.lower() in EXTENSIONS and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix()


def _matching(folder: Path, files: Iterable[str], pattern: str) -> list[Capture]:
    expression = _expression(pattern)
    captures: dict[str, dict[str, Path]] = defaultdict(dict)
    for file in files:
        match = expression.fullmatch(file)
        if match is None:
            continue
        bands = captures[match["capture"]]
        if match["band"] in bands:
            raise DataError(
                f"{bands[match['band']]} and {folder / file} are both band {match['band']} of capture "
                f'{match["capture"]}; name one kind of file by a pattern such as "{pattern}.tif"'
            )
        bands[match["band"]] = folder / file
    if not any(len(bands) > 1 for bands in captures.values()):
        return []
    return [
        Capture(name, {band: captures[name][band] for band in sorted(captures[name], key=natural_order)})
        for name in sorted(captures, key=natural_order)
    ]


def _expression(pattern: str) -> re.Pattern[str]:
    fields = _FIELD.findall(pattern)
    if sorted(set(fields)) != ["band", "capture"]:
        raise DataError(
            f'a pattern holds {{capture}} and {{band}}, as in "{{capture}}_{{band}}.tif", got {pattern!r}'
        )
    seen: set[str] = set()
    text = ""
    for part in re.split(r"(\{capture\}|\{band\}|\*)", pattern.replace("\\", "/")):
        field = part.strip("{}")
        if part == "*":
            text += "[^/]*"
        elif not _FIELD.fullmatch(part):
            text += re.escape(part)
        elif field in seen:
            text += f"(?P={field})"
        else:
            seen.add(field)
            # A band is what follows the last separator; a capture may lie in folders of its own.
            text += r"(?P<band>[^/_]+)" if field == "band" else r"(?P<capture>.+?)"
    if Path(pattern).suffix.lower() not in EXTENSIONS:
        text += rf"(?i:{'|'.join(re.escape(ending) for ending in EXTENSIONS)})"
    return re.compile(text)


def _read_list(path: Path) -> list[Capture]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    bands = [column for column in columns if column != "capture"]
    if "capture" not in columns or len(bands) < 2:
        raise DataError(
            f'{path} must have a column "capture" and two bands or more, '
            f"got {', '.join(columns) or 'nothing'}"
        )
    captures = [
        Capture(row["capture"], {band: path.parent / row[band] for band in bands if row[band]})
        for row in rows
    ]
    if not captures:
        raise DataError(f"{path} lists no captures")
    return as_captures(captures)
