"""The output folder of a job: one run at a time, one job ever, and a journal that outlives any kill.

`job.json` says which job it is, `job.lock` is locked while one runs, and `journal.jsonl` gets a line for each
pair as soon as it is done. `results.parquet` is made of the journal, in the order of the pairs, at the end of
each run; nothing is read back from it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kglmatch.batch.arrow import pyarrow, pyarrow_parquet
from kglmatch.batch.pairs import PairList
from kglmatch.errors import DataError, OutputError
from kglmatch.files import atomic_output, make_folder

JOB_FILE, LOCK_FILE, JOURNAL_FILE, RESULTS_FILE = "job.json", "job.lock", "journal.jsonl", "results.parquet"
_TEMPORARY = ".tmp-"  # what `atomic_output` begins names with
_SYNC_SECONDS = 1.0  # between writes to the disk itself, which only a loss of power makes matter
_ROWS = 10_000  # of `results.parquet` that are held at once


@dataclass(frozen=True)
class JobReport:
    """What a run of a job came to.

    Attributes:
        folder: the output folder.
        total: pairs of the job; None where the shards were not all read.
        done_before: pairs answered by runs before this one.
        answered: pairs that have an answer now.
        errors: pairs, or shards, that ended in an error in this run.
        first_error: the first of them, in one line, or None.
        seconds: of this run.
    """

    folder: Path
    total: int | None
    done_before: int
    answered: int
    errors: int
    first_error: str | None
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every pair has an answer."""
        return self.errors == 0 and self.total == self.answered


# --- the folder -----------------------------------------------------------------------------------


@contextmanager
def open_job(folder: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """Makes the output folder, or takes it up again; yields it while no other run can.

    Args:
        folder: a new or empty one, or that of the same job.
        identity: what the results depend on; plain values.

    Raises:
        OutputError: a folder of another job, with other files, in use, or that cannot be written.
    """
    make_folder(folder)
    check_job(folder, identity)  # before anything is written
    with _locked(folder):
        if not check_job(folder, identity):
            with atomic_output(folder / JOB_FILE) as temporary:
                temporary.write_text(json.dumps(dict(identity), indent=1) + "\n", encoding="utf-8")
            sync_file(folder / JOB_FILE)
        _clear_temporary(folder)
        yield folder


def check_job(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder holds this job; False for a new or empty one.

    Raises:
        OutputError: it holds another job, or other files.
    """
    try:
        text = (folder / JOB_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        foreign = [name for name in names if name != LOCK_FILE and not name.startswith(_TEMPORARY)]
        if foreign:
            raise OutputError(
                f"cannot write to {folder}: it holds other files ({min(foreign)}) and no job; "
                "name a new folder"
            ) from None
        return False
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {folder / JOB_FILE}: {error}") from error
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise OutputError(f"cannot write to {folder}: its {JOB_FILE} describes no job; name a new folder")
    wanted = json.loads(json.dumps(dict(identity)))
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            raise OutputError(
                f"cannot write to {folder}: it belongs to another job, whose {key} is "
                f"{_short(found.get(key))}, not {_short(wanted.get(key))}; name a new folder"
            )
    return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:76]}..."


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock goes with the process, however it ends."""
    path = folder / LOCK_FILE
    try:
        file = path.open("r+b" if path.exists() else "w+b")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    with file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK):
                raise OutputError(f"cannot lock {path}: {error.strerror or error}") from error
            with suppress(OSError):
                file.seek(0)
                owner = file.read().decode(errors="replace").strip()
            raise OutputError(
                f"{folder} is in use by another run ({owner or 'unknown'}); wait for it, or name a new folder"
            ) from error
        with suppress(OSError):  # a full disk: the lock holds all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            file.flush()
        yield


def _lock(file: BinaryIO) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(1 << 30)  # beyond the text, which others read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        file.seek(0)
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _clear_temporary(folder: Path) -> None:
    """Removes what killed runs left half-written. The lock is ours, so nobody writes there."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for path in place.glob(f"{_TEMPORARY}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Waits until a file's content, and its name, are on the disk."""
    for place in (path, path.parent):
        with suppress(OSError):  # folders cannot be opened everywhere
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


# --- the journal ----------------------------------------------------------------------------------


class Journal:
    """A line of JSON for each pair that is done, and where the newest of each pair stands.

    Args:
        folder: the output folder.
        pairs: of the job.

    Raises:
        OutputError: the journal holds other pairs, or cannot be read.
    """

    def __init__(self, folder: Path, pairs: PairList) -> None:
        self.path, self._pairs, self._folder = folder / JOURNAL_FILE, pairs, folder
        self._rows = pairs.rows_by_name()
        self._starts = np.full(len(pairs), -1, np.int64)
        self.answered = np.zeros(len(pairs), bool)
        self._end = 0
        self._file: BinaryIO | None = None
        self._synced = time.monotonic()
        if self.path.exists():
            self._scan()

    def __enter__(self) -> Journal:
        try:
            self._file = self.path.open("ab", buffering=0)
            # What a killed run did not finish writing.
            self._file.truncate(self._end)
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds what is known of a pair; it takes the place of an earlier line of that name.

        Raises:
            OutputError: the disk is full. The journal is as it was before.
        """
        assert self._file is not None
        line = json.dumps(dict(row), ensure_ascii=True, allow_nan=False).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise self._failed(error) from error
        self._note(row, self._end)
        self._end += len(line)

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
            if self.path.exists():
                with self.path.open("rb") as file:
                    for first in range(0, len(done), _ROWS):
                        rows = [self._read(file, row) for row in done[first : first + _ROWS]]
                        writer.write_table(pa.Table.from_pylist(rows, schema))
        sync_file(path)

    def _read(self, file: BinaryIO, row: int) -> dict[str, Any]:
        file.seek(self._starts[row])
        found: dict[str, Any] = json.loads(file.readline())
        return found

    def _scan(self) -> None:
        try:
            with self.path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    # After a loss of power a line may be anything; its pair is done again.
                    row = _parse(line)
                    if row is not None:
                        self._note(row, self._end)
                    self._end += len(line)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error

    def _note(self, row: Mapping[str, Any], start: int) -> None:
        name, error = row["name"], row["error"]
        at = self._rows.get(name)
        if at is None or (self._pairs[at].vis, self._pairs[at].ir) != (row["vis"], row["ir"]):
            raise OutputError(
                f"cannot write to {self._folder}: it holds results of other pairs "
                f"({name}: {row['vis']}, {row['ir']}); name a new folder"
            )
        self._starts[at], self.answered[at] = start, error is None

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write {self.path}: {error.strerror or error}")


def _parse(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None where it holds none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    complete = isinstance(row, dict) and {"name", "vis", "ir", "error"} <= row.keys()
    return row if complete else None


def _arrow_type(kind: str) -> Any:
    pa = pyarrow()
    return pa.list_(_arrow_type(kind[1:-1])) if kind.startswith("[") else pa.type_for_alias(kind)
