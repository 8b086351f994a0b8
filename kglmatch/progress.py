"""Progress bars: on stderr, only where that is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def steps(items: Iterable[T], what: str, *, show: bool) -> Iterable[T]:
    """The items, with a progress bar called `what` while they are used, if `show` and on a terminal."""
    if not show:
        return items
    from tqdm import tqdm

    # disable=None: no bar where stderr is no terminal. Nothing is left of it in the end.
    bar: Iterable[T] = tqdm(items, desc=what, leave=False, disable=None)
    return bar


@contextmanager
def counter(
    what: str, *, total: int | None, done: int, show: bool, unit: str = "pair"
) -> Iterator[Callable[[int], object]]:
    """Yields a function that takes how many more are done; a bar as in `steps` shows the time left."""
    if not show:
        yield lambda _count: None
        return
    from tqdm import tqdm

    with tqdm(desc=what, total=total, initial=done, leave=False, disable=None, unit=unit) as bar:
        yield bar.update
