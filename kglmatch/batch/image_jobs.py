"""Jobs on image pairs: `run_match` and `run_register` work through a list of pairs into an output folder."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kglmatch.batch.job_folder import JobReport, check_job, open_job, sync_file
from kglmatch.batch.journal import Journal
from kglmatch.batch.model import Model
from kglmatch.batch.pairs import PairList
from kglmatch.batch.ray_engine import RayOptions, run_on_ray
from kglmatch.errors import KGLMatchError, OutputError
from kglmatch.features import MATCH_FORMATS
from kglmatch.files import make_folder
from kglmatch.images import read_image_raw, save_image
from kglmatch.matcher import Matcher
from kglmatch.progress import counter
from kglmatch.registration.files import read_map_tags, save_stack
from kglmatch.resampling import warp_around_nodata
from kglmatch.streaming.match import match_many
from kglmatch.streaming.register import register_many
from kglmatch.streaming.results import Pair, PairMatches, PairRegistration
from kglmatch.streaming.worker import Failure, call
from kglmatch.streaming.workers import Workers

ENGINES = ("local", "ray")
IMAGE_FORMATS = (".tif", ".png")

_MODEL, _RAY = Model(), RayOptions()
_WRITERS = 2  # threads that write images while the next pairs are registered
_CHUNK = 8  # pairs that a Ray actor takes at once

_PAIR_FIELDS = {"name": "string", "vis": "string", "ir": "string", "error": "string"}
MATCH_FIELDS = {
    **_PAIR_FIELDS,
    "keypoints_vis": "int32",
    "keypoints_ir": "int32",
    "matches": "int32",
    "inliers": "int32",
    "homography": "[double]",
    "seconds": "double",
    "file": "string",
}
REGISTER_FIELDS = {
    **_PAIR_FIELDS,
    "verdict": "string",
    "confidence": "double",
    "kind": "string",
    "transform": "[double]",
    "places": "int32",
    "inliers": "int32",
    "median_residual": "double",
    "support": "double",
    "agreement": "double",
    "num_matches": "int32",
    "vis_size": "[int32]",
    "ir_size": "[int32]",
    "seconds": "double",
    "file": "string",
}


@dataclass
class _Work:
    """What is done with each pair; travels to other processes, where it loads its own matcher.

    Attributes:
        model: loaded on first use.
        options: of `match_many` or `register_many`.
        folder: for a file a pair, or None.
        ending: of those files.
        workers: processes that read ahead; None for the default.
    """

    model: Model
    options: dict[str, Any]
    folder: Path | None
    ending: str
    workers: int | None = None
    _matcher: Matcher | None = field(default=None, repr=False)
    _kept: Workers | None = field(default=None, repr=False)

    def prepare(self) -> None:
        """Loads the model."""
        if self._matcher is None:
            self._matcher = self.model.load()

    def __call__(self, items: list[Pair]) -> list[dict[str, Any]]:
        """Rows of a few pairs; worker processes are kept for the next few."""
        if self._kept is None and self.workers is not None:
            self._kept = Workers(self.workers)
        return list(self.rows(items, self._kept))

    def rows(self, pairs: Iterable[Pair], workers: Workers | None = None) -> Iterator[dict[str, Any]]:
        """A row for each pair, in their order; files are written while the next pairs are worked on."""
        self.prepare()
        assert self._matcher is not None
        results = self.work(self._matcher, pairs, workers=workers or self.workers, **self.options)
        if self.folder is None:
            yield from map(self.row, results)
            return
        writing: deque[Future[dict[str, Any]]] = deque()
        with ThreadPoolExecutor(_WRITERS) as writers:
            for result in results:
                path = self.folder / f"{result.pair.name}{self.ending}"
                writing.append(
                    writers.submit(_write_file, result.pair, path, self.writer(result), self.row(result))
                )
                while writing and (writing[0].done() or len(writing) > 2 * _WRITERS):
                    yield writing.popleft().result()
            while writing:
                yield writing.popleft().result()

    def work(self, matcher: Matcher, pairs: Iterable[Pair], **options: Any) -> Iterator[Any]:
        """A result for each pair, in their order."""
        raise NotImplementedError

    def row(self, result: Any) -> dict[str, Any]:
        """What the table of results says of a pair."""
        raise NotImplementedError

    def writer(self, result: Any) -> Callable[[Path], None] | None:
        """What writes the file of a pair; None where there is nothing to write."""
        raise NotImplementedError


class MatchWork(_Work):
    """Matches pairs."""

    def work(self, matcher: Matcher, pairs: Iterable[Pair], **options: Any) -> Iterator[PairMatches]:
        return match_many(matcher, pairs, **options)

    def row(self, result: PairMatches) -> dict[str, Any]:
        row = _pair_row(result.pair)
        if result.matches is None:
            return {**row, "error": result.error}
        found = result.matches
        return {
            **row,
            "keypoints_vis": result.keypoints_vis,
            "keypoints_ir": result.keypoints_ir,
            "matches": len(found),
            "inliers": 0 if found.inliers is None else int(found.inliers.sum()),
            "homography": None if found.homography is None else found.homography.ravel().tolist(),
            "seconds": round(result.seconds, 4),
        }

    def writer(self, result: PairMatches) -> Callable[[Path], None] | None:
        return None if result.matches is None else result.matches.save


class RegisterWork(_Work):
    """Registers pairs."""

    def work(self, matcher: Matcher, pairs: Iterable[Pair], **options: Any) -> Iterator[PairRegistration]:
        return register_many(matcher, pairs, **options)

    def row(self, result: PairRegistration) -> dict[str, Any]:
        row = _pair_row(result.pair)
        if result.registration is None:
            return {**row, "error": result.error}
        facts = result.registration.to_dict()
        transform = result.registration.transform
        facts["transform"] = None if transform is None else transform.ravel().tolist()
        return {**row, **facts, "seconds": round(result.seconds, 4)}

    def writer(self, result: PairRegistration) -> Callable[[Path], None] | None:
        found = result.registration
        if found is None or found.transform is None:
            return None
        transform, size = found.transform, found.vis_size
        vis, ir, nodata = Path(result.pair.vis), Path(result.pair.ir), self.options.get("nodata")

        def write(path: Path) -> None:
            pixels = read_image_raw(ir)
            if nodata is None:
                image = found.warp(pixels)
            else:
                image = warp_around_nodata(pixels, transform, size, nodata=nodata)
            tags = read_map_tags(vis) if self.ending == ".tif" else []
            if tags:
                save_stack(path, [image], [ir.name], map_tags=tags, nodata=nodata)
            else:
                save_image(path, image)

        return write


def _write_file(
    pair: Pair, path: Path, write: Callable[[Path], None] | None, row: dict[str, Any]
) -> dict[str, Any]:
    """The row with the file of its pair, which is on the disk before the row is.

    Raises:
        OutputError: a full disk, or the like: the job cannot go on.
    """
    if write is None:
        return row

    def write_and_sync() -> OutputError | None:
        try:
            write(path)
        except OutputError as error:
            if isinstance(error.__cause__, OSError):
                return error  # of the disk, not of this pair
            raise
        sync_file(path)
        return None

    failed = call(write_and_sync)
    if isinstance(failed, OutputError):
        raise failed
    if isinstance(failed, Failure):
        return {**_pair_row(pair), "error": failed.message}
    return {**row, "file": f"{path.parent.name}/{path.name}"}


def _pair_row(pair: Pair) -> dict[str, Any]:
    return {"name": pair.name, "vis": str(pair.vis), "ir": str(pair.ir), "error": None}


# --- running --------------------------------------------------------------------------------------


def run_match(
    pairs: Sequence[Pair],
    folder: str | Path,
    *,
    model: Model = _MODEL,
    save: str | None = None,
    workers: int | None = None,
    engine: str = "local",
    ray: RayOptions = _RAY,
    progress: bool = False,
    **options: Any,
) -> JobReport:
    """Matches a list of image pairs into a folder, and resumes where an earlier run stopped.

    `folder/results.parquet` gets a row a pair: `name`, `vis`, `ir`, `error` or null, `keypoints_vis`,
    `keypoints_ir`, `matches`, `inliers`, `homography` (9 numbers, row by row, or null), `seconds`, `file`.
    Pairs that ended in an error are tried again by the next run.

    Args:
        pairs: as from `read_pairs` or `pairs_of_folders`.
        folder: new, empty, or that of the same job.
        model: the weights.
        save: ".npz", ".csv" or ".json" for a file of matches a pair, in `folder/matches`.
        workers: processes that read ahead, as for `Matcher.match_many`; on Ray those of each actor.
        engine: "local", or "ray" for a cluster, all of whose machines reach the images and the folder.
        ray: how many actors.
        progress: draw a bar with the time left, if stderr is a terminal.
        options: as for `Matcher.match_many`.

    Raises:
        OutputError: a folder of another job or in use, or a full disk; the next run resumes.
        KGLMatchError: a parameter out of range, or what goes wrong with the model.
    """
    _check(engine, save, MATCH_FORMATS)
    work = MatchWork(model, options, None if save is None else Path(folder) / "matches", save or "", workers)
    return _run("match", work, pairs, Path(folder), MATCH_FIELDS, engine, ray, progress)


def run_register(
    pairs: Sequence[Pair],
    folder: str | Path,
    *,
    model: Model = _MODEL,
    save: str | None = None,
    workers: int | None = None,
    engine: str = "local",
    ray: RayOptions = _RAY,
    progress: bool = False,
    **options: Any,
) -> JobReport:
    """Registers a list of image pairs into a folder, and resumes where an earlier run stopped.

    `folder/results.parquet` gets a row a pair: `name`, `vis`, `ir`, `error` or null, and what
    `Registration.to_dict` says; `transform` is 9 numbers, row by row, or null. A verdict "failed" is an
    answer.

    Args:
        save: ".tif" or ".png" for the aligned ir image of each pair that did not fail, in
            `folder/aligned`; its bit depth and channels are kept.
        options: as for `Matcher.register_many`.
        pairs, folder, model, workers, engine, ray, progress: as for `run_match`.

    Raises:
        OutputError, KGLMatchError: as for `run_match`.
    """
    _check(engine, save, IMAGE_FORMATS)
    work = RegisterWork(
        model, options, None if save is None else Path(folder) / "aligned", save or "", workers
    )
    return _run("register", work, pairs, Path(folder), REGISTER_FIELDS, engine, ray, progress)


def pending_pairs(
    command: str, model: Model, save: str | None, pairs: PairList, folder: Path, options: Any
) -> int:
    """How many pairs a run would work on; nothing is written. Raises as the run would."""
    if not check_job(folder, _identity(command, model, save, options)):
        return len(pairs)
    return int((~Journal(folder, pairs).answered).sum())


def _check(engine: str, save: str | None, formats: Sequence[str]) -> None:
    if engine not in ENGINES:
        raise KGLMatchError(f"engine must be one of {ENGINES}, got {engine!r}")
    if save is not None and save not in formats:
        raise KGLMatchError(f"save must be one of {', '.join(formats)}, or None, got {save!r}")


def _identity(command: str, model: Model, save: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"job": command, **model.identity(), "save": save or None, **options}


def _run(
    command: str,
    work: MatchWork | RegisterWork,
    pairs: Sequence[Pair],
    folder: Path,
    fields: Mapping[str, str],
    engine: str,
    ray: RayOptions,
    progress: bool,
) -> JobReport:
    began = time.perf_counter()
    if not isinstance(pairs, PairList):
        pairs = PairList([p.vis for p in pairs], [p.ir for p in pairs], [p.name for p in pairs])
    errors, first_error = 0, None
    folder = folder.absolute()
    identity = _identity(command, work.model, work.ending, work.options)
    with open_job(folder, identity), Journal(folder, pairs) as journal:
        before = int(journal.answered.sum())
        try:
            if before < len(pairs):
                if work.folder is not None:
                    work.folder = make_folder(folder / work.folder.name)
                with (
                    counter(command, total=len(pairs), done=before, show=progress) as count,
                    closing(_rows(work, journal.pending(), engine, ray)) as rows,
                ):
                    for row in rows:
                        journal.append(row)
                        count(1)
                        if row["error"] is not None:
                            errors += 1
                            first_error = first_error or f"{row['name']}: {row['error']}"
        except OutputError:
            raise  # a full disk has no room for the table either
        except BaseException:
            journal.write_results(fields)
            raise
        journal.write_results(fields)
        answered = int(journal.answered.sum())
    return JobReport(folder, len(pairs), before, answered, errors, first_error, time.perf_counter() - began)


def _rows(
    work: MatchWork | RegisterWork, pairs: Iterator[Pair], engine: str, ray: RayOptions
) -> Generator[dict[str, Any], None, None]:
    """A row for each pair, in the order in which they are done."""
    yield from run_on_ray(work, _chunks(pairs), ray, _lost) if engine == "ray" else work.rows(pairs)


def _chunks(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    chunk: list[Pair] = []
    for pair in pairs:
        chunk.append(pair)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _lost(pair: Pair) -> dict[str, Any]:
    return {**_pair_row(pair), "error": "the actors that worked on it died"}
