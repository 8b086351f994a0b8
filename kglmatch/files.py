"""Writing files so that no half-written one is ever left under its final name."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kglmatch.errors import OutputError

# What a full or failing disk reports; other `OSError`s of the body may come from what it reads.
_WRITE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path to write to; it becomes `path` if the body ends, and goes if it raises.

    The temporary file exists already, empty, in the folder of `path` and with its suffix, so that
    writers that choose a format by suffix work, and the final rename stays on one file system.
    A file already at `path` is replaced in one step. A symbolic link is written through.

    Args:
        path: the file to write.

    Raises:
        OutputError: the folder is missing or unwritable, `path` is a folder or another thing that
            is not a plain file, or the disk is full.

    Examples:
        >>> with atomic_output("result.json") as temporary:
        ...     temporary.write_text("{}")
    """
    final, temporary = _begin(path)
    try:
        yield temporary
        temporary.replace(final)
    except OSError as error:
        own = error.filename is None or os.fspath(error.filename) == os.fspath(temporary)
        if own or error.errno in _WRITE_ERRNOS:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_output(path: str | os.PathLike[str]) -> None:
    """Raises `OutputError` where `atomic_output` would, before hours of work; leaves nothing behind."""
    _, temporary = _begin(path)
    temporary.unlink()


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder to fill; it becomes `path` if the body ends, and goes if it raises.

    Args:
        path: the folder to make, inside one that exists. An empty folder there is replaced.

    Raises:
        OutputError: there is a file or a folder that is not empty, the folder around it is missing
            or unwritable, or the disk is full.
    """
    final = Path(os.path.realpath(path))
    try:
        if final.is_dir() and any(final.iterdir()):
            raise OutputError(f"cannot write {path}: the folder exists and is not empty; name a new one")
        if final.exists() and not final.is_dir():
            raise OutputError(f"cannot write {path}: it is a file; expected the name of a new folder")
        if not final.parent.is_dir():
            raise _no_folder(path, final.parent)
        temporary = final.with_name(f".tmp-{secrets.token_hex(8)}")
        temporary.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield temporary
        if final.is_dir():
            final.rmdir()  # empty, as found above; Windows renames onto no folder
        temporary.replace(final)
    except OSError as error:
        own = error.filename is None or str(error.filename).startswith((str(temporary), str(final)))
        if own or error.errno in _WRITE_ERRNOS:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Makes a folder, and those around it, unless it is there.

    Raises:
        OutputError: it cannot be made, or is a file.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise OutputError(f"cannot write to {path}: it is a file; expected a folder") from error
    except OSError as error:
        raise OutputError(f"cannot make the folder {path}: {error.strerror or error}") from error
    return folder


def _begin(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file that is meant, links followed, and a new empty file beside it."""
    final = Path(os.path.realpath(path))
    try:
        is_folder, exists, has_parent = final.is_dir(), final.exists(), final.parent.is_dir()
    except OSError as error:
        # A name too long for the file system.
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    if is_folder:
        raise OutputError(f"cannot write {path}: it is a folder; expected the name of a file")
    if exists and not final.is_file():
        raise OutputError(f"cannot write {path}: it is not a plain file, and would be replaced by one")
    if not has_parent:
        raise _no_folder(path, final.parent)
    temporary = final.with_name(f".tmp-{secrets.token_hex(8)}{final.suffix}")
    try:
        # Not by `tempfile`: the file gets the permissions that any new file gets.
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return final, temporary


def _no_folder(path: str | os.PathLike[str], parent: Path) -> OutputError:
    if parent.exists():
        return OutputError(f"cannot write {path}: {parent} is a file, not a folder")
    return OutputError(f"cannot write {path}: the folder {parent} does not exist; create it first")
