"""Progress bars: on stderr, only where that is a terminal."""

from __future__ import annotations

from collections.abc import Iterable
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
