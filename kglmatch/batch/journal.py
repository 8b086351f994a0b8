"""What is done of a job, a line of JSON each: a record that outlives any kill.

`journal.jsonl` gets a line for each pair as soon as it is done. `results.parquet` is made of the journal, in
the order of the pairs, at the end of each run; nothing is read back from it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from kglmatch.batch.arrow import pyarrow, pyarrow_parquet
from kglmatch.batch.job_folder import RESULTS_FILE, sync_file
from kglmatch.batch.pairs import PairList
from kglmatch.errors import OutputError
from kglmatch.files import atomic_output

JOURNAL_FILE = "journal.jsonl"
_SYNC_SECONDS = 1.0  # between writes to the disk itself, which only a loss of power makes matter
_ROWS = 10_000  # of `results.parquet` that are held at once


class LineLog:
    """A file of JSON lines that are only ever appended; a context manager, also for several threads.

    A line that a killed run did not finish is cut off. After a loss of power a line may be anything; it is
    passed over.

    Args:
        path: the file; made when it is entered.

    Raises:
        OutputError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._end: int | None = None
        self._file: BinaryIO | None = None
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        try:
            if self._end is None and self.path.exists():
                for _ in self.rows():
                    continue
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(self._end or 0)
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Where each whole line begins, in bytes, and what it holds."""
        start = 0
        try:
            with self.path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    row = _parse(line)
                    if row is not None:
                        yield start, row
                    start += len(line)
            self._end = start
        except OSError as error:
            raise OutputError(f"cannot read {self.path}: {error.strerror or error}") from error

    def append(self, row: Mapping[str, Any]) -> int:
        """Adds a line; where it begins.

        Raises:
            OutputError: the disk is full. The file is as it was before.
        """
        assert self._file is not None
        line = json.dumps(dict(row), ensure_ascii=True, allow_nan=False).encode() + b"\n"
        with self._lock:
            start = self._end or 0
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
                if time.monotonic() - self._synced > _SYNC_SECONDS:
                    os.fsync(self._file.fileno())
                    self._synced = time.monotonic()
            except OSError as error:
                with suppress(OSError):
                    self._file.truncate(start)
                raise self._failed(error) from error
            self._end = start + len(line)
        return start

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write {self.path}: {error.strerror or error}")


class Journal:
    """The lines of a list of pairs, and where the newest of each pair is; a context manager.

    Args:
        folder: the output folder.
        pairs: of the job.

    Raises:
        OutputError: the journal holds other pairs, or cannot be read.
    """

    def __init__(self, folder: Path, pairs: PairList) -> None:
        self._pairs, self._folder = pairs, folder
        self._log = LineLog(folder / JOURNAL_FILE)
        self._rows = pairs.rows_by_name()
        self._starts = np.full(len(pairs), -1, np.int64)
        self.answered = np.zeros(len(pairs), bool)
        if self._log.path.exists():
            for start, row in self._log.rows():
                if {"name", "vis", "ir", "error"} <= row.keys():
                    self._note(row, start)

    def __enter__(self) -> Self:
        self._log.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._log.__exit__()

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds what is known of a pair; it takes the place of an earlier line of that name.

        Raises:
            OutputError: the disk is full. The journal is as it was before.
        """
        self._note(row, self._log.append(row))

    def pending(self) -> Iterator[Any]:
        """The pairs without an answer, in their order; those that ended in an error are tried again."""
        for row in np.flatnonzero(~self.answered).tolist():
            yield self._pairs[row]

    def write_results(self, fields: Mapping[str, str]) -> None:
        """Writes `results.parquet`, a row for each pair that is done, in the order of the pairs.

        Args:
            fields: column -> type, as in Arrow's names of types; "[double]" is a list.

        Raises:
            OutputError: it cannot be written.
        """
        pa, pq = pyarrow(), pyarrow_parquet()
        schema = pa.schema([(name, _arrow_type(kind)) for name, kind in fields.items()])
        path = self._folder / RESULTS_FILE
        done = np.flatnonzero(self._starts >= 0)
        with atomic_output(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            if self._log.path.exists():
                with self._log.path.open("rb") as file:
                    for first in range(0, len(done), _ROWS):
                        rows = [self._read(file, row) for row in done[first : first + _ROWS]]
                        writer.write_table(pa.Table.from_pylist(rows, schema))
        sync_file(path)

    def _read(self, file: BinaryIO, row: int) -> dict[str, Any]:
        file.seek(self._starts[row])
        found: dict[str, Any] = json.loads(file.readline())
        return found

    def _note(self, row: Mapping[str, Any], start: int) -> None:
        name, error = row["name"], row["error"]
        at = self._rows.get(name)
        if at is None or (self._pairs[at].vis, self._pairs[at].ir) != (row["vis"], row["ir"]):
            raise OutputError(
                f"cannot write to {self._folder}: it holds results of other pairs "
                f"({name}: {row['vis']}, {row['ir']}); name a new folder"
            )
        self._starts[at], self.answered[at] = start, error is None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _arrow_type(kind: str) -> Any:
    pa = pyarrow()
    return pa.list_(_arrow_type(kind[1:-1])) if kind.startswith("[") else pa.type_for_alias(kind)
