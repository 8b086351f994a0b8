"""Lists of image pairs: two folders, a CSV file, a Parquet file. Paths and names only: millions fit."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from kglmatch.batch.arrow import pyarrow, pyarrow_parquet
from kglmatch.errors import DataError
from kglmatch.streaming.results import Pair

LIST_FORMATS = (".csv", ".parquet")


class PairList(Sequence[Pair]):
    """Pairs of image files, each with a name of its own.

    Args:
        vis, ir: paths; relative ones are relative to the current folder.
        names: of the pairs; None takes the file names of `vis` without their extensions, with the row in
            front where these are not unique.
        alone: names of files that had no partner.

    Raises:
        DataError: lists of different lengths, a name twice, or one that cannot be a file's name.
    """

    def __init__(
        self,
        vis: Sequence[str | Path],
        ir: Sequence[str | Path],
        names: Sequence[str] | None = None,
        *,
        alone: Sequence[str] = (),
    ) -> None:
        if len(vis) != len(ir) or (names is not None and len(names) != len(vis)):
            counts = [len(vis), len(ir), *([] if names is None else [len(names)])]
            raise DataError(f"a list of pairs needs as many of each, got {' and '.join(map(str, counts))}")
        if names is None:
            names = [Path(path).stem for path in vis]
            if len(set(names)) < len(names):
                width = len(str(len(names)))
                names = [f"{row:0{width}}_{name}" for row, name in enumerate(names)]
        _check_names(names)
        pa = pyarrow()
        self.alone = tuple(alone)
        # Columns of Arrow take a fifth of what Python's strings do.
        self._names = pa.array(names, pa.large_string())
        self._vis, self._ir = (
            pa.array([os.path.abspath(path) for path in side], pa.large_string())  # noqa: PTH100
            for side in (vis, ir)
        )

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, row: int) -> Pair: ...
    @overload
    def __getitem__(self, row: slice) -> list[Pair]: ...
    def __getitem__(self, row: int | slice) -> Pair | list[Pair]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return Pair(self._vis[row].as_py(), self._ir[row].as_py(), self._names[row].as_py())

    def rows_by_name(self) -> dict[str, int]:
        """The row of each name."""
        return {name: row for row, name in enumerate(self._names.to_pylist())}


def _check_names(names: Sequence[str]) -> None:
    seen = set()
    for row, name in enumerate(names):
        if name in ("", ".", "..") or any(c in name for c in "/\\\0\n"):
            raise DataError(f"pair {row} is called {name!r}, which cannot be the name of a file")
        if name in seen:
            raise DataError(f"two pairs are called {name!r}; names must differ")
        seen.add(name)


def pairs_of_folders(vis: str | Path, ir: str | Path) -> PairList:
    """Files of one name (without the extension) in two folders, sorted by name.

    Raises:
        DataError: a folder that cannot be read, two files of one name in it, or no pair.
    """
    paired, alone = files_of_one_name(vis, ir)
    names = [path.stem for path, _ in paired]
    return PairList([path for path, _ in paired], [path for _, path in paired], names, alone=alone)


def files_of_one_name(vis: str | Path, ir: str | Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Files of one name (without the extension) in two folders, sorted by name.

    Returns:
        the pairs, and the names that only one of the folders holds.

    Raises:
        DataError: as `pairs_of_folders`.
    """
    of_vis, of_ir = _by_stem(Path(vis)), _by_stem(Path(ir))
    shared = sorted(of_vis.keys() & of_ir.keys())
    if not shared:
        raise DataError(
            f"{vis} and {ir} have no file name in common "
            f"({len(of_vis)} and {len(of_ir)} files); pairs have the same name in both"
        )
    return [(of_vis[name], of_ir[name]) for name in shared], sorted(of_vis.keys() ^ of_ir.keys())


def read_pairs(path: str | Path) -> PairList:
    """A list of pairs: columns `vis` and `ir`, paths relative to its folder, and `name` if there is one.

    Args:
        path: .csv with a header line, or .parquet.

    Raises:
        DataError: another ending, a file that cannot be read, a column or an entry that is missing.
    """
    path = Path(path)
    reader = {".csv": _read_csv, ".parquet": _read_parquet}.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is no list of pairs: the name must end in {' or '.join(LIST_FORMATS)}")
    columns = reader(path)
    for name in ("vis", "ir"):
        if name not in columns:
            raise DataError(f"{path} has no column {name!r}; it has {', '.join(columns) or 'none'}")
    for name in ("vis", "ir", "name"):
        for row, value in enumerate(columns.get(name, ())):
            if not isinstance(value, str) or not value:
                raise DataError(f"{path}: column {name!r} has no text in row {row} (counted from 0)")
    folder = path.parent
    vis, ir = ([folder / value for value in columns[name]] for name in ("vis", "ir"))
    return PairList(vis, ir, columns.get("name"))


def _read_csv(path: Path) -> dict[str, list[Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns: dict[str, list[Any]] = {name: [] for name in reader.fieldnames or ()}
            for row in reader:
                for name, column in columns.items():
                    column.append(row[name])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return columns


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    pa = pyarrow()
    try:
        wanted = [n for n in pyarrow_parquet().read_schema(path).names if n in ("vis", "ir", "name")]
        table = pyarrow_parquet().read_table(path, columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return {name: table[name].to_pylist() for name in wanted}


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in _files(folder):
        if path.stem in found:
            raise DataError(
                f"{folder} holds both {found[path.stem].name} and {path.name}: which one is meant?"
            )
        found[path.stem] = path
    return found


def _files(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}") from error
    return (folder / name for name in entries if not name.startswith("."))
