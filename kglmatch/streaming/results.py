"""A pair of images, and what matching or registering it gave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kglmatch.errors import KGLMatchError
from kglmatch.features import Matches
from kglmatch.registration.results import Registration


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images.

    Attributes:
        vis, ir: anything that `kglmatch.images.load_image` reads; paths are read by worker processes.
        name: what results and messages call it.
    """

    vis: Any
    ir: Any
    name: str = ""


@dataclass(frozen=True, eq=False)
class PairMatches:
    """What `match_many` says about a pair.

    Attributes:
        pair: the pair.
        matches: as from `match_images`; None where there is an error.
        error: why there are none, in one line, or None.
        keypoints_vis, keypoints_ir: how many were found.
        seconds: of work on this pair, in whichever process.
    """

    pair: Pair
    matches: Matches | None = None
    error: str | None = None
    keypoints_vis: int = 0
    keypoints_ir: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class PairRegistration:
    """What `register_many` says about a pair.

    Attributes:
        pair: the pair.
        registration: as from `register`, whatever its verdict; None where there is an error.
        error: why there is none, in one line, or None.
        seconds: of work on this pair, in whichever process.
    """

    pair: Pair
    registration: Registration | None = None
    error: str | None = None
    seconds: float = 0.0


def as_pairs(pairs: Iterable[Any]) -> Iterator[Pair]:
    """`Pair`s of pairs or of (vis, ir); those without a name are numbered.

    Raises:
        KGLMatchError: something else among them.
    """
    for number, pair in enumerate(pairs):
        if isinstance(pair, Pair):
            yield pair if pair.name else Pair(pair.vis, pair.ir, str(number))
        elif isinstance(pair, tuple | list) and len(pair) == 2:
            yield Pair(pair[0], pair[1], str(number))
        else:
            raise KGLMatchError(
                f"pair {number} is a {type(pair).__name__}, expected (vis, ir) or kglmatch.Pair"
            )
