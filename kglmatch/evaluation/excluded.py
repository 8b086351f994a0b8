"""Image pairs that a report leaves out in a second set of figures, such as those published misaligned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kglmatch.datasets import PatchSource
from kglmatch.errors import DataError


def excluded_of(sources: Sequence[PatchSource], names: Iterable[str]) -> dict[str, list[str]]:
    """The excluded pairs of each subset.

    Args:
        sources: the subsets.
        names: "subset/pair" of folders of image pairs.

    Raises:
        DataError: a name of another form, or of a pair that is not there.
    """
    known = {source.name: {pair.name for pair in source.pairs} for source in sources}
    found: dict[str, list[str]] = {}
    for name in names:
        subset, _, pair = name.rpartition("/")
        if pair not in known.get(subset, ()):
            raise DataError(
                f'cannot exclude "{name}": expected subset/pair of an image pair in the data, as field/0001'
            )
        found.setdefault(subset, []).append(pair)
    return found
