"""`run_score`: scores shards of patch pairs into an output folder, piece by piece.

Each piece of a shard becomes a small file of its own under `parts/`, whole or not at all; what is there is
not done again. `results.parquet` is made of them at the end of each run.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from kglmatch.batch.arrow import pyarrow, pyarrow_parquet
from kglmatch.batch.image_jobs import ENGINES
from kglmatch.batch.job_folder import RESULTS_FILE, JobReport, check_job, open_job, sync_file
from kglmatch.batch.model import Model
from kglmatch.batch.ray_engine import RayOptions, run_on_ray
from kglmatch.batch.scorer import Scorer
from kglmatch.batch.shards import Piece, count_pairs, find_shards, read_pieces
from kglmatch.errors import DataError, KGLMatchError, OutputError
from kglmatch.files import atomic_output, make_folder
from kglmatch.models.pretrained import load_config
from kglmatch.progress import counter

PARTS_FOLDER = "parts"
PIECE = 1024  # pairs in a file of `parts`; what a kill costs at most
DONE_FILE = "done.json"  # of a shard

FIELDS = {"shard": "string", "name": "string", "score": "float32", "error": "string"}

_MODEL, _RAY = Model(), RayOptions()
_AHEAD = 2  # pieces that wait for the network
_ROW_GROUP = 65_536  # rows of `results.parquet`


@dataclass
class ScoreWork:
    """Scores shards; travels to other processes, where it loads its own matcher.

    Attributes:
        model: loaded on first use.
        folder: of the parts.
        patch_size: pixels.
        workers: of no meaning here.
    """

    model: Model
    folder: Path
    patch_size: int
    workers: int | None = 0
    _scorer: Scorer | None = field(default=None, repr=False)

    def prepare(self) -> None:
        """Loads the model."""
        if self._scorer is None:
            self._scorer = Scorer(self.model)
        _ = self._scorer.matcher

    def __call__(self, items: list[Any]) -> list[dict[str, Any]]:
        """A row for each (number, path) of a shard."""
        found = []
        for number, path in items:
            rows = list(self.rows(number, path))
            found.append({**rows[-1], "done": sum(row["done"] for row in rows)})
        return found

    def rows(self, number: int, path: Path) -> Iterator[dict[str, Any]]:
        """Scores what is left of a shard; a row for each piece, and one at the end of the shard."""
        self.prepare()
        assert self._scorer is not None
        folder = make_folder(part_folder(self.folder, number))
        row = {"shard": number, "end": False, "error": None, "done": 0}
        if read_done(folder) is None:
            finished, rows = count_parts(folder)
            pieces = ahead(read_pieces(path, self.patch_size, PIECE, finished), _AHEAD)
            try:
                for piece in pieces:
                    scores = self._scorer.score(piece.vis, piece.ir, piece.errors)
                    _write_part(folder / part_name(finished), str(path), piece, scores)
                    finished, rows = finished + 1, rows + len(piece)
                    yield {**row, "done": len(piece)}
            except DataError as error:
                yield {**row, "end": True, "error": str(error)}
                return
            with atomic_output(folder / DONE_FILE) as temporary:
                temporary.write_text(json.dumps({"parts": finished, "pairs": rows}) + "\n", encoding="utf-8")
            sync_file(folder / DONE_FILE)
        yield {**row, "end": True}


def part_folder(folder: Path, number: int) -> Path:
    """Where the parts of a shard are."""
    return folder / f"{number:06}"


def part_name(number: int) -> str:
    """The file of a piece."""
    return f"{number:06}.parquet"


def count_parts(folder: Path) -> tuple[int, int]:
    """How many parts of a shard there are, and how many pairs in them. The last one may hold fewer."""
    parts = 0
    while (folder / part_name(parts)).exists():
        parts += 1
    if not parts:
        return 0, 0
    last: int = pyarrow_parquet().read_metadata(folder / part_name(parts - 1)).num_rows
    return parts, (parts - 1) * PIECE + last


def read_done(folder: Path) -> dict[str, int] | None:
    """How many parts and pairs a shard came to, if it is done."""
    try:
        found: dict[str, int] = json.loads((folder / DONE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _write_part(path: Path, shard: str, piece: Piece, scores: Any) -> None:
    pa, pq = pyarrow(), pyarrow_parquet()
    table = pa.table(
        {
            "shard": pa.array([shard] * len(piece), pa.string()),
            "name": pa.array(piece.names, pa.string()),
            "score": pa.array(scores, pa.float32(), mask=np.isnan(scores)),
            "error": pa.array(piece.errors, pa.string()),
        }
    )
    with atomic_output(path) as temporary:
        pq.write_table(table, temporary)
    sync_file(path)


def ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
    """The items, read by a thread that is up to `count` of them ahead."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(count)
    stop = threading.Event()

    def put(item: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    threading.Thread(target=read, name="kglmatch reader", daemon=True).start()
    try:
        while True:
            more, item = waiting.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stop.set()


def score_identity(model: Model, shards: Sequence[Path]) -> dict[str, Any]:
    """What the results of `run_score` depend on."""
    digest = hashlib.sha256("\0".join(map(str, shards)).encode()).hexdigest()
    return {
        "job": "score",
        **model.identity(),
        "shards": len(shards),
        "paths": digest,
        "piece": PIECE,
    }


def run_score(
    shards: Sequence[str | Path],
    folder: str | Path,
    *,
    model: Model = _MODEL,
    engine: str = "local",
    ray: RayOptions = _RAY,
    progress: bool = False,
) -> JobReport:
    """Scores shards of patch pairs into a folder, and resumes where an earlier run stopped.

    `folder/results.parquet` gets a row a pair, in the order of the shards: `shard`, `name`, `score` in [0, 1]
    or null, `error` or null. A shard that cannot be read to its end adds a row with its error, and is tried
    again by the next run from there.

    Args:
        shards: files and folders of files, see `kglmatch.batch.shards`.
        folder: new, empty, or that of the same job.
        model: the weights.
        engine, ray, progress: as for `run_match`. On Ray each shard is worked on by one actor.

    Raises:
        OutputError: a folder of another job or in use, or a full disk; the next run resumes.
        DataError: no shards.
        KGLMatchError: what goes wrong with the model.
    """
    if engine not in ENGINES:
        raise KGLMatchError(f"engine must be one of {ENGINES}, got {engine!r}")
    began = time.perf_counter()
    paths = find_shards(shards)
    folder = Path(folder).absolute()
    patch_size = load_config(model.name).patch_size
    with open_job(folder, score_identity(model, paths)):
        parts = make_folder(folder / PARTS_FOLDER)
        before, pending = _progress(parts, paths)
        work = ScoreWork(model, parts, patch_size)
        total = _total(paths)
        failed: dict[int, str] = {}
        try:
            with (
                counter("score", total=total, done=before, show=progress) as advance,
                closing(_rows(work, pending, engine, ray)) as rows,
            ):
                for row in rows:
                    advance(row["done"])
                    if row["error"] is not None:
                        failed[row["shard"]] = row["error"]
        except OutputError:
            raise  # a full disk has no room for the table either
        except BaseException:
            _write_results(folder, paths, failed)
            raise
        answered, errors, first_error = _write_results(folder, paths, failed)
    return JobReport(
        folder=folder,
        total=None if failed else answered + errors,
        done_before=before,
        answered=answered,
        errors=errors + len(failed),
        first_error=first_error,
        seconds=time.perf_counter() - began,
    )


def pending_scores(shards: Sequence[str | Path], folder: Path, model: Model) -> tuple[int | None, int | None]:
    """How many pairs there are, and on how many a run would work, where that is known; nothing is written.

    Raises:
        OutputError, DataError, KGLMatchError: as `run_score`.
    """
    paths = find_shards(shards)
    total, before = _total(paths), 0
    if check_job(folder, score_identity(model, paths)):
        before, _ = _progress(folder / PARTS_FOLDER, paths)
    return total, None if total is None else total - before


def _total(shards: Sequence[Path]) -> int | None:
    """Pairs of all shards; None where one of them does not say."""
    total = 0
    for shard in shards:
        found = count_pairs(shard)
        if found is None:
            return None
        total += found
    return total


def _progress(parts: Path, shards: Sequence[Path]) -> tuple[int, list[tuple[int, Path]]]:
    """How many pairs are done, and the numbers and paths of the shards that are not."""
    before, pending = 0, []
    for number, path in enumerate(shards):
        place = part_folder(parts, number)
        done = read_done(place)
        before += done["pairs"] if done else count_parts(place)[1]
        if done is None:
            pending.append((number, path))
    return before, pending


def _rows(
    work: ScoreWork, shards: list[tuple[int, Path]], engine: str, ray: RayOptions
) -> Generator[dict[str, Any], None, None]:
    if engine == "ray":
        yield from run_on_ray(work, ([shard] for shard in shards), ray, _lost)
        return
    for shard in shards:
        yield from work.rows(*shard)


def _write_results(
    folder: Path, shards: Sequence[Path], failed: Mapping[int, str]
) -> tuple[int, int, str | None]:
    """Writes `results.parquet`; how many pairs have a score, how many an error, and the first error."""
    pa, pq = pyarrow(), pyarrow_parquet()
    answered, errors, first = 0, 0, None
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in FIELDS.items()])
    path = folder / RESULTS_FILE
    with atomic_output(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        held: list[Any] = []
        for number, shard in enumerate(shards):
            place = part_folder(folder / PARTS_FOLDER, number)
            for part in count():
                if not (place / part_name(part)).exists():
                    break
                table = pq.read_table(place / part_name(part))
                answered += len(table) - table["score"].null_count
                wrong = len(table) - table["error"].null_count
                errors += wrong
                if wrong and first is None:
                    row = next(row for row in table.to_pylist() if row["error"] is not None)
                    first = f"{shard}, {row['name']}: {row['error']}"
                held.append(table.cast(schema))
                if sum(map(len, held)) >= _ROW_GROUP:
                    writer.write_table(pa.concat_tables(held))
                    held = []
            if number in failed:
                first = first or failed[number]
                row = {"shard": str(shard), "name": None, "score": None, "error": failed[number]}
                held.append(pa.Table.from_pylist([row], schema))
        if held:
            writer.write_table(pa.concat_tables(held))
    sync_file(path)
    return answered, errors, first


def _lost(item: tuple[int, Path]) -> dict[str, Any]:
    return {
        "shard": item[0],
        "end": True,
        "error": f"{item[1]}: the actors that worked on it died",
        "done": 0,
    }
