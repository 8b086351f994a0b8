"""Shards of patch pairs: Parquet, npz and WebDataset tar files, read piece by piece.

- Parquet: columns `vis` and `ir`, and `name` if there is one. A patch is an image file (PNG, JPEG, TIFF) or
  the bytes of its P x P 8-bit pixels, or a list of P * P numbers, uint8 or floats in [0, 1].
- npz: arrays `vis` and `ir` (N, P, P), and `name` if there is one.
- tar, also compressed: `KEY.vis.png` and `KEY.ir.png`, or another image format.
"""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kglmatch.batch.arrow import pyarrow, pyarrow_parquet
from kglmatch.batch.patch_columns import patches_of_column
from kglmatch.errors import DataError, KGLMatchError

SHARD_FORMATS = (".parquet", ".npz", ".tar", ".tar.gz", ".tgz")

_BUFFER = 1 << 20  # bytes that are read at once


@dataclass(frozen=True, eq=False)
class Piece:
    """Some pairs of a shard.

    Attributes:
        names: of the pairs.
        vis, ir: (N, P, P) uint8, or float32 in [0, 1]; zeros where there is an error.
        errors: why a pair has no patches, or None.
    """

    names: list[str]
    vis: NDArray[Any]
    ir: NDArray[Any]
    errors: list[str | None]

    def __len__(self) -> int:
        return len(self.names)


def find_shards(paths: Sequence[str | Path]) -> list[Path]:
    """Files, and the shards in folders, in order, as absolute paths.

    Raises:
        DataError: a folder without shards, another kind of file, or a file twice. A missing file is an error
            of its own when its turn comes.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if is_shard(p) and not p.name.startswith("."))
            if not inside:
                raise DataError(f"{path} holds no shards: expected files in {', '.join(SHARD_FORMATS)}")
        for file in inside:
            if not is_shard(file):
                raise DataError(f"{file} is no shard: the name must end in one of {', '.join(SHARD_FORMATS)}")
            found.append(file.absolute())
    twice = {path for path in found if found.count(path) > 1} if len(set(found)) < len(found) else ()
    if twice:
        raise DataError(f"{min(twice)} is given twice")
    return found


def is_shard(path: Path) -> bool:
    """Whether a file's name ends as a shard's does."""
    return path.name.lower().endswith(SHARD_FORMATS)


def count_pairs(path: Path) -> int | None:
    """How many pairs a shard holds, where that is known without reading it."""
    try:
        if path.suffix.lower() == ".parquet":
            count: int = pyarrow_parquet().read_metadata(path).num_rows
            return count
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive, archive.open("vis.npy") as file:
                return _read_header(file, path)[0][0]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, pyarrow().ArrowException):
        return None  # it is reported when the shard is read
    return None


def read_pieces(path: Path, patch_size: int, rows: int, skip: int = 0) -> Iterator[Piece]:
    """The pairs of a shard, `rows` at a time, after the first `skip` pieces; only one piece is held.

    Raises:
        DataError: a shard that is missing, damaged or lacks a column; after the pieces before that place.
    """
    reader = {".parquet": _read_parquet, ".npz": _read_npz}.get(path.suffix.lower(), _read_tar)
    pa = pyarrow()
    damaged = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, tarfile.TarError)
    try:
        yield from reader(path, patch_size, rows, skip)
    except KGLMatchError:
        raise
    except (*damaged, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read {path}: {reason}") from error


def _piece(names: Sequence[str], vis: Any, ir: Any, patch_size: int) -> Piece:
    """A piece of columns as they were stored."""
    patches_vis, errors_vis = patches_of_column(vis, patch_size)
    patches_ir, errors_ir = patches_of_column(ir, patch_size)
    errors: list[str | None] = [None] * len(names)
    for side, found in (("ir", errors_ir), ("vis", errors_vis)):
        for row, message in found.items():
            errors[row] = f"{side}: {message}"
    return Piece(list(names), patches_vis, patches_ir, errors)


# --- Parquet --------------------------------------------------------------------------------------


def _read_parquet(path: Path, patch_size: int, rows: int, skip: int) -> Iterator[Piece]:
    with pyarrow_parquet().ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
        columns = file.schema_arrow.names
        _check_columns(path, columns)
        wanted = [name for name in ("vis", "ir", "name") if name in columns]
        # Whole row groups are skipped unread.
        first, group = 0, 0
        while group < file.num_row_groups:
            count = file.metadata.row_group(group).num_rows
            if first + count > skip * rows:
                break
            first, group = first + count, group + 1
        groups = list(range(group, file.num_row_groups))
        drop = skip * rows - first
        batches = iter(())
        if groups:
            batches = file.iter_batches(rows, row_groups=groups, columns=wanted, use_threads=False)
        for start, table in _regrouped(batches, rows, drop, first):
            names = (
                [str(name) for name in table["name"].to_pylist()]
                if "name" in wanted
                else _numbers(start, len(table))
            )
            yield _piece(names, table["vis"].combine_chunks(), table["ir"].combine_chunks(), patch_size)


def _regrouped(batches: Iterator[Any], rows: int, drop: int, first: int) -> Iterator[tuple[int, Any]]:
    """Tables of `rows` rows with the number of their first, after `drop` rows, however they come."""
    pa = pyarrow()
    start, held, count = first + drop, [], 0
    for batch in batches:
        cut = min(drop, len(batch))
        drop -= cut
        held.append(batch.slice(cut))
        count += len(batch) - cut
        while count >= rows:
            table = pa.Table.from_batches(held)
            yield start, table.slice(0, rows)
            start, count = start + rows, count - rows
            held = table.slice(rows).to_batches()
    if count:
        yield start, pa.Table.from_batches(held)


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    for name in ("vis", "ir"):
        if name not in columns:
            raise DataError(f"{path} has no column or array {name!r}; it has {', '.join(columns) or 'none'}")


def _numbers(start: int, count: int) -> list[str]:
    return [str(number) for number in range(start, start + count)]


# --- npz ------------------------------------------------------------------------------------------


def _read_npz(path: Path, patch_size: int, rows: int, skip: int) -> Iterator[Piece]:
    with zipfile.ZipFile(path) as archive:
        stored = [name.removesuffix(".npy") for name in archive.namelist()]
        _check_columns(path, stored)
        with archive.open("vis.npy") as vis, archive.open("ir.npy") as ir:
            (shape, kind), (shape_ir, kind_ir) = _read_header(vis, path), _read_header(ir, path)
            for name, found in (("vis", shape), ("ir", shape_ir)):
                if found[1:] != (patch_size, patch_size):
                    raise DataError(
                        f"{path}: {name} has shape {found}, expected (N, {patch_size}, {patch_size})"
                    )
            if shape != shape_ir:
                raise DataError(f"{path}: {shape[0]} visible and {shape_ir[0]} ir patches")
            names = None
            if "name" in stored:
                with archive.open("name.npy") as file:
                    names = np.lib.format.read_array(file, allow_pickle=False).astype(str).tolist()
            pixels = patch_size * patch_size
            for file, dtype in ((vis, kind), (ir, kind_ir)):
                _skip(file, min(skip * rows, shape[0]) * pixels * dtype.itemsize)
            for start in range(skip * rows, shape[0], rows):
                count = min(rows, shape[0] - start)
                sides = [
                    _read_rows(file, count, pixels, dtype).reshape(count, patch_size, patch_size)
                    for file, dtype in ((vis, kind), (ir, kind_ir))
                ]
                part = _numbers(start, count) if names is None else names[start : start + count]
                yield _piece(part, sides[0], sides[1], patch_size)


def _read_header(file: Any, path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran or dtype.hasobject or not shape:
        raise DataError(f"{path}: an array of type {dtype} and shape {shape} holds no patches row by row")
    return shape, dtype


def _skip(file: Any, count: int) -> None:
    while count > 0:
        read = len(file.read(min(count, _BUFFER)))
        if not read:
            raise EOFError("the file is truncated")
        count -= read


def _read_rows(file: Any, rows: int, row: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    data = file.read(rows * row * dtype.itemsize)
    if len(data) < rows * row * dtype.itemsize:
        raise EOFError("the file is truncated")
    return np.frombuffer(data, dtype)


# --- tar ------------------------------------------------------------------------------------------


def _read_tar(path: Path, patch_size: int, rows: int, skip: int) -> Iterator[Piece]:
    with closing(_samples(path)) as samples:
        for _ in islice(samples, skip * rows):
            pass
        while part := list(islice(samples, rows)):
            names, vis, ir = zip(*part, strict=True)
            yield _piece(names, list(vis), list(ir), patch_size)


def _samples(path: Path) -> Generator[tuple[str, bytes | None, bytes | None], None, None]:
    """Key, visible and ir file of each sample; files of one key stand together."""
    ended = False

    class Member(tarfile.TarInfo):
        """Notes the block of zeros that ends an archive; tarfile takes the end of the file for one, too."""

        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
            nonlocal ended
            ended = ended or (len(buf) > 0 and not any(buf))
            return super().frombuf(buf, encoding, errors)

    with tarfile.open(path, "r|*", bufsize=_BUFFER, tarinfo=Member) as archive:
        key, sides = None, dict[str, bytes]()
        for member in archive:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            this = f"{folder}/{stem}" if folder else stem
            if this != key:
                if sides:
                    yield str(key), sides.get("vis"), sides.get("ir")
                key, sides = this, {}
            side = ending.partition(".")[0]
            if side in ("vis", "ir"):
                content = archive.extractfile(member)
                sides[side] = b"" if content is None else content.read()
        if not ended:
            raise EOFError("the archive is truncated: it lacks the blocks that end it")
        if sides:
            yield str(key), sides.get("vis"), sides.get("ir")
