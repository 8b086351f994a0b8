"""Writing files so that no half-written one is ever left under its final name.

What is written goes to a hidden temporary file or folder next to its final place, named after the process
that writes it. A process that is killed leaves its temporaries behind; the next one that writes into the
folder removes them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from kglmatch.errors import OutputError

# What a full or failing disk reports; other `OSError`s of the body may come from what it reads.
_WRITE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

# Temporaries that other machines, or containers, left on a shared disk are stale after a day without change.
STALE_SECONDS = 24 * 3600.0
_TEMPORARY = re.compile(r"\.tmp-(?P<place>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}(\.[^/]*)?")
# Folders that this process has cleared. Once is enough, and a folder may hold many files.
_cleared: set[Path] = set()


@dataclass(frozen=True)
class _Written:
    """A temporary that is complete: it becomes `final`, which the user called `path`."""

    path: str | os.PathLike[str]
    final: Path
    temporary: Path

    def move(self) -> None:
        """Puts it in its place."""
        if self.temporary.is_dir() and self.final.is_dir():
            self.final.rmdir()  # empty, as `atomic_folder` found it; Windows renames onto no folder
        self.temporary.replace(self.final)

    def keep_old(self) -> Path | None:
        """A second name of the file that `move` will replace, if there is one."""
        if not self.final.is_file():
            return None
        kept = _temporary_name(self.final)
        try:
            os.link(self.final, kept)
        except OSError:  # a file system without links
            shutil.copy2(self.final, kept)
        return kept


_group: ContextVar[list[_Written] | None] = ContextVar("_group", default=None)


@contextmanager
def atomic_outputs() -> Iterator[None]:
    """What is written within the body appears together when it ends, or not at all if it raises.

    Collects every `atomic_output` and `atomic_folder` of the body, by this thread, in whatever function:
    their temporaries stay until the body ends and are then renamed, one right after the other. Should a
    rename fail, those before it are undone. Nothing can be read back under its final name before that.

    Raises:
        OutputError: a file cannot be put in its place.

    Examples:
        >>> with atomic_outputs():
        ...     matches.save("matches.npz")
        ...     write_image("warped.png", warped)
    """
    outer = _group.get()
    written: list[_Written] = []
    token = _group.set(written)
    try:
        yield
    except BaseException:
        _discard(written)
        raise
    finally:
        _group.reset(token)
    if outer is not None:
        outer.extend(written)
        return
    moved: list[tuple[_Written, Path | None]] = []
    try:
        for output in written:
            try:
                moved.append((output, output.keep_old()))
                output.move()
            except OSError as error:
                raise OutputError(f"cannot write {output.path}: {error.strerror or error}") from error
    except BaseException:
        for output, kept in reversed(moved):
            _undo(output, kept)
        _discard(written)
        raise
    for _, kept in moved:
        _remove(kept)


def _undo(output: _Written, kept: Path | None) -> None:
    """As it was before `move`, which may not have happened."""
    if kept is not None:
        with suppress(OSError):
            kept.replace(output.final)
    elif not output.temporary.exists():
        _remove(output.final)


def _discard(written: list[_Written]) -> None:
    for output in written:
        _remove(output.temporary)


def _finish(path: str | os.PathLike[str], final: Path, temporary: Path) -> None:
    """Puts a complete temporary in its place, or leaves that to the group that it belongs to."""
    output, group = _Written(path, final, temporary), _group.get()
    if group is None:
        output.move()
    else:
        group.append(output)


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
    finished = False
    try:
        yield temporary
        _finish(path, final, temporary)
        finished = True
    except OSError as error:
        own = error.filename is None or os.fspath(error.filename) == os.fspath(temporary)
        if own or error.errno in _WRITE_ERRNOS:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    finally:
        if not finished:
            _remove(temporary)


def split_band(name: str | os.PathLike[str]) -> tuple[str, str | None]:
    """A file and its band: "image.tif:B08" -> ("image.tif", "B08"); None without a band.

    A file that has a colon in its own name is itself.
    """
    text = os.fspath(name)
    head, colon, tail = text.rpartition(":")
    if not colon or not tail or "/" in tail or "\\" in tail or Path(text).exists():
        return text, None
    return (head, tail) if Path(head).exists() or head.startswith("/vsi") else (text, None)


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
        temporary = _temporary_name(final.with_suffix(""))
        clear_stale(final.parent)
        temporary.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finished = False
    try:
        yield temporary
        _finish(path, final, temporary)
        finished = True
    except OSError as error:
        own = error.filename is None or str(error.filename).startswith((str(temporary), str(final)))
        if own or error.errno in _WRITE_ERRNOS:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    finally:
        if not finished:
            _remove(temporary)


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


# --- temporaries ----------------------------------------------------------------------------------


def clear_stale(folder: Path, *, again: bool = False) -> None:
    """Removes temporaries that killed processes left in a folder; never one that a process still writes.

    A temporary of this machine is stale when its process no longer runs, one of another machine on a
    shared disk when nothing in it has changed for `STALE_SECONDS`.

    Args:
        folder: where outputs are written; each is looked through once a process.
        again: look through it once more.
    """
    if folder in _cleared and not again:
        return
    _cleared.add(folder)
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _TEMPORARY.fullmatch(entry.name)
            if found and _is_stale(Path(entry.path), found["place"], int(found["pid"])):
                _remove(Path(entry.path))


def _is_stale(temporary: Path, place: str, pid: int) -> bool:
    # Windows has no signal 0: there, `os.kill` would end the process.
    if place == _place() and os.name == "posix":
        return not _is_running(pid)
    try:
        inside = temporary.rglob("*") if temporary.is_dir() else ()
        changed = max(path.stat().st_mtime for path in (temporary, *inside))
    except OSError:
        return False  # it is being renamed or removed
    return time.time() - changed > STALE_SECONDS


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # of another user, say
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    # A process that was killed keeps its number until its parent asks; some containers never do.
    return state.rpartition(")")[2].split()[:1] != ["Z"]


@functools.cache
def _place() -> str:
    """Where numbers of processes mean what they mean here: this machine since it started, this container."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        started, namespace = str(uuid.getnode()), ""
    return hashlib.sha256("\n".join((platform.node(), started, namespace)).encode()).hexdigest()[:8]


def _temporary_name(final: Path) -> Path:
    """A new name next to `final`, with its suffix."""
    return final.with_name(f".tmp-{_place()}-{os.getpid()}-{secrets.token_hex(4)}{final.suffix}")


def _remove(path: Path | None) -> None:
    """Removes a file or a whole folder, if it is there."""
    if path is None:
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _begin(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file that is meant, links followed, and a new empty file next to it."""
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
    clear_stale(final.parent)
    temporary = _temporary_name(final)
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
