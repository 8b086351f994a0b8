"""Progress: bars on stderr where that is a terminal, or lines for a program that runs the command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

VARIABLE = "KGLMATCH_PROGRESS"  # of the environment; "lines" for lines


def steps(items: Iterable[T], what: str, *, show: bool) -> Iterable[T]:
    """The items, with a progress bar called `what` while they are used, if `show` and on a terminal."""
    if not show or _as_lines():
        return items
    from tqdm import tqdm

    # disable=None: no bar where stderr is no terminal. Nothing is left of it in the end.
    bar: Iterable[T] = tqdm(items, desc=what, leave=False, disable=None)
    return bar


@contextmanager
def counter(
    what: str, *, total: int | None, done: int, show: bool, unit: str = "pair"
) -> Iterator[Callable[[int], object]]:
    """Yields a function that takes how many more are done; a bar as in `steps` shows the time left.

    With KGLMATCH_PROGRESS=lines in the environment there are lines in its place, such as
    "kglmatch: progress: tiles 12/64".
    """
    if not show:
        yield lambda _count: None
        return
    if _as_lines():
        yield _lines(what, total, done)
        return
    from tqdm import tqdm

    with tqdm(desc=what, total=total, initial=done, leave=False, disable=None, unit=unit) as bar:
        yield bar.update


def _as_lines() -> bool:
    return os.environ.get(VARIABLE) == "lines"


def _lines(what: str, total: int | None, done: int) -> Callable[[int], None]:
    """Prints a line whenever a whole percent more is done."""
    shown = -1

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        percent = 100 * done // total if total else -1
        if percent > shown:
            shown = percent
            print(f"kglmatch: progress: {what} {done}/{total}", file=sys.stderr, flush=True)

    return advance
