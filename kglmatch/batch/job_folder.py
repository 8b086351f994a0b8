"""The output folder of a job: one run at a time, and one job ever.

`job.json` says which job it is and which versions of kglmatch worked on it; `job.lock` is locked while one
runs. What is done so far is for each job to record, see `kglmatch.batch.journal`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kglmatch.errors import OutputError
from kglmatch.files import atomic_output, make_folder
from kglmatch.options import __version__

JOB_FILE, LOCK_FILE, RESULTS_FILE = "job.json", "job.lock", "results.parquet"
# Of what a job's folder holds. A new number is an error for the jobs of the old one; a new version of
# kglmatch is not: a long job outlives upgrades, and may need one for the pairs that ended in an error.
JOB_FORMAT = 1
_VERSIONS = "kglmatch_versions"
_TEMPORARY = ".tmp-"  # what `atomic_output` begins names with

logger = logging.getLogger(__name__)


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

    A job that another version of kglmatch began is resumed, with a warning: what is done is kept as it is.
    `job.json` lists the versions.

    Args:
        folder: a new or empty one, or that of the same job.
        identity: what the results depend on; plain values.

    Raises:
        OutputError: a folder of another job, with other files, in use, or that cannot be written.
    """
    make_folder(folder)
    check_job(folder, identity)  # before anything is written
    with _locked(folder):
        found = _read_job(folder, identity)
        before: list[str] = [] if found is None else found.get(_VERSIONS, [])
        if __version__ not in before:
            described = {"format": JOB_FORMAT, **identity, _VERSIONS: [*before, __version__]}
            with atomic_output(folder / JOB_FILE) as temporary:
                temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
            sync_file(folder / JOB_FILE)
        others = [version for version in before if version != __version__]
        if others:
            logger.warning(
                "%s was begun by kglmatch %s; %s resumes it and keeps those results. For results of one "
                "version, name a new folder",
                folder,
                ", ".join(others),
                __version__,
            )
        _clear_temporary(folder)
        yield folder


def check_job(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a folder holds this job; False for a new or empty one.

    Raises:
        OutputError: it holds another job, or other files.
    """
    return _read_job(folder, identity) is not None


def _read_job(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `job.json` says, if it is of this job; None for a new or empty folder."""
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
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {folder / JOB_FILE}: {error}") from error
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise OutputError(f"cannot write to {folder}: its {JOB_FILE} describes no job; name a new folder")
    wanted = json.loads(json.dumps({"format": JOB_FORMAT, **identity}))
    for key in sorted((wanted.keys() | found.keys()) - {_VERSIONS}):
        if wanted.get(key) != found.get(key):
            raise OutputError(
                f"cannot write to {folder}: it belongs to another job, whose {key} is "
                f"{_short(found.get(key))}, not {_short(wanted.get(key))}; name a new folder"
            )
    return found


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
    for path in list(folder.rglob(f"{_TEMPORARY}*")):
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
