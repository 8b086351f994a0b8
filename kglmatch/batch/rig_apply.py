"""Warping the captures of a flight onto the reference of its rig: in parallel, and resumed after any kill."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kglmatch.batch.captures import Capture, as_captures
from kglmatch.batch.job_folder import open_job, sync_file
from kglmatch.batch.journal import LineLog
from kglmatch.batch.rig import image_size
from kglmatch.batch.rig_files import map_tags_of_part, read_metadata, write_bands
from kglmatch.batch.rig_pool import refine_capture
from kglmatch.batch.rig_results import Rig, RigBand
from kglmatch.errors import DataError, ImageError, KGLMatchError, OutputError
from kglmatch.files import atomic_output, make_folder
from kglmatch.images import load_image, read_image_raw
from kglmatch.progress import steps
from kglmatch.resampling import check_nodata, covered_by, warp_around_nodata, warp_image
from kglmatch.streaming.worker import Failure, call

Matrix = NDArray[np.float64]
S = TypeVar("S")
T = TypeVar("T")

LOG_FILE = "captures.jsonl"
_LOOKED_AT = 5  # captures whose size must fit before anything is written
_AHEAD = 2  # captures a worker that are begun before the first of them has ended


@dataclass(frozen=True)
class ApplyReport:
    """What `apply_rig` did.

    Attributes:
        written: captures that were written by this run.
        present: captures that an earlier run had written.
        refined: captures of this run of which at least one band was refined.
        problems: captures that were not written -> why.
        crop: (left, top, width, height) of the reference that the outputs show.
    """

    written: tuple[str, ...]
    present: tuple[str, ...]
    refined: tuple[str, ...]
    problems: dict[str, str]
    crop: tuple[int, int, int, int]


def apply_rig(
    rig: Rig,
    captures: str | os.PathLike[str] | Iterable[Capture | Mapping[str, Any]],
    out: str | os.PathLike[str],
    *,
    bands: Sequence[str] | None = None,
    stack: bool = True,
    crop: bool = False,
    refine: bool = False,
    nodata: float | None = None,
    force: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> ApplyReport:
    """Warps all bands of every capture onto its reference, and writes them.

    Stopped at any moment, by a kill too, it resumes when it is called again with the same arguments: a
    capture that is there is whole, and is not made twice.

    Args:
        rig: of these captures, see `calibrate_rig`.
        captures: as for `calibrate_rig`.
        out: folder; made if missing. Holds CAPTURE.tif, or CAPTURE_BAND.tif; `job.json`, what is done
            here; `captures.jsonl`, a line a capture.
        bands: to write after the reference, in this order; None for all of the rig.
        stack: one file a capture; else a file a band, each with the metadata of its own image.
        crop: to the part of the reference that all bands cover, the same for all captures.
        refine: refine each capture about the rig's transform, where windows that were held out of the fit
            support that more.
        nodata: value of pixels without data, in the images and where a band does not cover the reference;
            None takes every pixel for data, and fills 0.
        force: warp bands too whose verdict is "varies" or "doubtful".
        workers: threads; None for one a core.
        progress: draw a progress bar on a terminal.

    Returns:
        `ApplyReport`. A capture that cannot be read, or lacks a band, is one of its `problems`.

    Raises:
        DataError: the captures are of another camera, or none has the reference or a band.
        KGLMatchError: a band that failed, or one that one transform does not serve (without `refine`); a
            nodata that its pixels cannot hold.
        OutputError: the folder belongs to another job, is in use by one, or cannot be written.
    """
    if workers is not None and workers < 1:
        raise KGLMatchError(f"workers must be 1 or more, got {workers}")
    chosen = [rig[name] for name in bands] if bands is not None else list(rig.bands)
    _check_verdicts(chosen, refine, force)
    source = Path(captures).resolve() if isinstance(captures, (str, os.PathLike)) else None
    if source is not None:
        check_outside(out, source)
    listed = as_captures(captures)
    _check_camera(rig, chosen, listed)
    if nodata is not None:
        _check_nodata(nodata, [rig.reference, *(band.name for band in chosen)], listed)
    area = common_area(rig, chosen) if crop else (0, 0, *rig.size)
    identity = {
        "job": "rig apply",
        "rig": rig.digest(),
        "captures": None if source is None else str(source),
        "bands": [rig.reference, *(band.name for band in chosen)],
        "stack": stack,
        "crop": list(area),
        "refine": refine,
        "nodata": nodata,
    }
    out = Path(out)
    with open_job(out, identity):
        with LineLog(out / LOG_FILE) as log:
            work = _Work(rig, chosen, area, out, stack, refine, nodata, log)
            present = [capture.name for capture in listed if work.is_done(capture)]
            there = set(present)
            todo = [capture for capture in listed if capture.name not in there]
            count = workers or os.cpu_count() or 1
            written, refined, problems = [], [], {}
            with ThreadPoolExecutor(count) as threads:
                results = in_order(threads, work.do, todo, _AHEAD * count)
                for capture, (problem, moved) in steps_of(results, len(todo), progress):
                    if problem is not None:
                        problems[capture.name] = problem
                    else:
                        written.append(capture.name)
                    if moved:
                        refined.append(capture.name)
        _compact(out / LOG_FILE, [capture.name for capture in listed])
    return ApplyReport(tuple(written), tuple(present), tuple(refined), problems, area)


def steps_of(items: Iterator[T], count: int, show: bool) -> Iterable[T]:
    """`progress.steps` for an iterator whose length is known."""
    return steps(_Sized(items, count), "warping", show=show)


class _Sized:
    def __init__(self, items: Iterator[Any], count: int) -> None:
        self._items, self._count = items, count

    def __iter__(self) -> Iterator[Any]:
        return self._items

    def __len__(self) -> int:
        return self._count


def in_order(
    threads: ThreadPoolExecutor, task: Callable[[S], T], items: Iterable[S], ahead: int
) -> Iterator[tuple[S, T]]:
    """Each item with what the task gives for it, in order; no more than `ahead` are begun at a time."""
    begun: deque[tuple[S, Future[T]]] = deque()
    try:
        for item in items:
            begun.append((item, threads.submit(task, item)))
            if len(begun) >= ahead:
                first, future = begun.popleft()
                yield first, future.result()
        while begun:
            first, future = begun.popleft()
            yield first, future.result()
    finally:
        for _, future in begun:
            future.cancel()


# --- before the work ------------------------------------------------------------------------------


def check_outside(out: str | os.PathLike[str], captures: str | os.PathLike[str]) -> None:
    """Raises `OutputError` for outputs within the captures: a later run would take them for captures."""
    if Path(out).resolve().is_relative_to(Path(captures).resolve()):
        raise OutputError(f"cannot write to {out}: it is within the captures; name a folder outside")


def _check_verdicts(bands: Sequence[RigBand], refine: bool, force: bool) -> None:
    if not bands:
        raise KGLMatchError("there is no band to warp")
    if len({band.name for band in bands}) < len(bands):
        raise KGLMatchError(f"a band is named twice: {', '.join(band.name for band in bands)}")
    for band in bands:
        if band.transform is None:
            raise KGLMatchError(f"band {band.name} failed ({band.reason}): leave it out by naming the others")
        if band.verdict == "registered" or force or (refine and band.verdict == "varies"):
            continue
        way = "refine each capture, force it" if band.verdict == "varies" else "force it"
        raise KGLMatchError(f"band {band.name} is not to be warped ({band.reason}): {way}, or leave it out")


def _check_camera(rig: Rig, bands: Sequence[RigBand], captures: Sequence[Capture]) -> None:
    if not captures:
        raise DataError("there are no captures to warp")
    sizes = {rig.reference: rig.size, **{band.name: band.size for band in bands}}
    for band, expected in sizes.items():
        having = [capture for capture in captures if band in capture.bands]
        if not having:
            raise DataError(f"no capture has band {band}, which the rig names")
        found = []
        for capture in having[:_LOOKED_AT]:
            try:
                found.append(image_size(capture.bands[band]))
            except ImageError:
                continue  # its own problem, later
        if found and expected not in found:
            raise DataError(
                f"the rig is of another camera: band {band} is {found[0][0]} x {found[0][1]}, "
                f"the rig's is {expected[0]} x {expected[1]}"
            )


def common_area(rig: Rig, bands: Sequence[RigBand]) -> tuple[int, int, int, int]:
    """The part of the reference that all bands cover: left, top, width, height.

    Raises:
        KGLMatchError: there is none.
    """
    covered = np.ones(rig.size[::-1], bool)
    for band in bands:
        if band.transform is not None:
            covered &= covered_by(band.transform, rig.size, np.ones(band.size[::-1], bool))
    left, top, right, bottom = 0, 0, *rig.size
    while left < right and top < bottom:
        part = covered[top:bottom, left:right]
        edges = [part[:, 0], part[0], part[:, -1], part[-1]]
        lacking = [1 - float(edge.mean()) for edge in edges]
        worst = int(np.argmax(lacking))
        if lacking[worst] == 0:
            return left, top, right - left, bottom - top
        left, top = left + (worst == 0), top + (worst == 1)
        right, bottom = right - (worst == 2), bottom - (worst == 3)
    raise KGLMatchError("the bands have no part of the reference in common")


def _check_nodata(nodata: float, names: Sequence[str], captures: Sequence[Capture]) -> None:
    """Raises `KGLMatchError` where the pixels of a band cannot hold the value."""
    for band in names:
        for capture in captures[:_LOOKED_AT]:
            try:
                image = capture.bands[band]
                pixels = read_image_raw(image) if isinstance(image, (str, os.PathLike)) else np.asarray(image)
            except (KeyError, ImageError):
                continue  # its own problem, later
            check_nodata(nodata, pixels.dtype)
            break


# --- one capture ----------------------------------------------------------------------------------


@dataclass
class _Work:
    """What is done with each capture."""

    rig: Rig
    bands: Sequence[RigBand]
    area: tuple[int, int, int, int]
    out: Path
    stack: bool
    refine: bool
    nodata: float | None
    log: LineLog

    def files(self, capture: Capture) -> dict[str, Path]:
        """Where each band goes."""
        names = [self.rig.reference, *(band.name for band in self.bands)]
        if self.stack:
            return dict.fromkeys(names, self.out / f"{capture.name}.tif")
        return {name: self.out / f"{capture.name}_{name}.tif" for name in names}

    def is_done(self, capture: Capture) -> bool:
        """Whether all its files are there; each is whole, or is not."""
        return all(path.is_file() for path in self.files(capture).values())

    def do(self, capture: Capture) -> tuple[str | None, list[str]]:
        """Warps and writes a capture: what was wrong with it, if anything, and the refined bands.

        Raises:
            OutputError: a full disk, or the like: the job cannot continue.
        """
        found = call(self._make, capture)
        if isinstance(found, OutputError):
            raise found
        if isinstance(found, Failure):
            self.log.append({"capture": capture.name, "error": found.message})
            return found.message, []
        return None, found

    def _make(self, capture: Capture) -> list[str] | OutputError:
        """The bands that were refined; or what is wrong with the disk, not with this capture."""
        images = self._read(capture)
        transforms = self._transforms(images)
        warped = {self.rig.reference: self._cut(images[self.rig.reference])}
        for band in self.bands:
            transform = transforms.get(band.name, band.transform)
            warped[band.name] = self._warp(images[band.name], transform, band.name)
        moved = {name: matrix.tolist() for name, matrix in transforms.items()}
        try:
            self.log.append({"capture": capture.name, "refined": moved})
            self._write(capture, warped)
        except OutputError as error:
            if isinstance(error.__cause__, OSError):
                return error
            raise
        return list(transforms)

    def _read(self, capture: Capture) -> dict[str, NDArray[Any]]:
        images = {}
        sizes = {self.rig.reference: self.rig.size, **{band.name: band.size for band in self.bands}}
        for name, size in sizes.items():
            if name not in capture.bands:
                raise DataError(f"has no band {name}")
            source = capture.bands[name]
            path = isinstance(source, (str, os.PathLike))
            images[name] = read_image_raw(source) if path else np.asarray(source)
            found = images[name].shape[1::-1]
            if found != size:
                what = source if path else f"band {name}"
                raise ImageError(
                    f"{what} is {found[0]} x {found[1]}, the rig's band {name} is {size[0]} x {size[1]}"
                )
        return images

    def _transforms(self, images: dict[str, NDArray[Any]]) -> dict[str, Matrix]:
        """The transforms that this capture supports more than the rig's."""
        if not self.refine:
            return {}
        vis = load_image(images[self.rig.reference])
        found = {}
        for band in self.bands:
            if band.transform is None:
                continue
            transform = refine_capture(vis, load_image(images[band.name]), band.transform)
            if transform is not None:
                found[band.name] = transform
        return found

    def _cut(self, image: NDArray[Any]) -> NDArray[Any]:
        left, top, width, height = self.area
        return np.ascontiguousarray(image[top : top + height, left : left + width])

    def _warp(self, image: NDArray[Any], transform: Matrix | None, name: str) -> NDArray[Any]:
        if transform is None:
            raise KGLMatchError(f"band {name} has no transform")
        left, top, width, height = self.area
        to_area = np.array([[1, 0, left], [0, 1, top], [0, 0, 1.0]])
        size = width, height
        if self.nodata is None:
            return warp_image(image, transform @ to_area, size)
        return warp_around_nodata(image, transform @ to_area, size, nodata=self.nodata)

    def _write(self, capture: Capture, warped: dict[str, NDArray[Any]]) -> None:
        files = self.files(capture)
        make_folder(next(iter(files.values())).parent)
        metadata = [read_metadata(capture.bands[name]) for name in warped]
        on_map = map_tags_of_part(capture.bands[self.rig.reference], self.area[:2])
        stacks = [tuple(warped)] if self.stack else [(name,) for name in warped]
        for number, names in enumerate(stacks):
            write_bands(
                files[names[0]],
                [warped[name] for name in names],
                names,
                metadata=metadata if self.stack else [metadata[number]],
                map_tags=on_map,
                nodata=self.nodata,
            )
            sync_file(files[names[0]])


# --- the record ------------------------------------------------------------------------------------


def _compact(path: Path, names: Sequence[str]) -> None:
    """Leaves the last line of each capture, in the order of the names."""
    last = {row["capture"]: row for _, row in LineLog(path).rows() if "capture" in row}
    with atomic_output(path) as temporary:
        lines = (f"{json.dumps(last[name])}\n" for name in names if name in last)
        temporary.write_text("".join(lines), encoding="utf-8")
