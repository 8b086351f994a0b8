"""`Scorer`: a table of patch pairs in, a table of scores out, for whatever framework hands out tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kglmatch.batch.model import Model
from kglmatch.batch.patch_columns import patches_of_column
from kglmatch.errors import DataError
from kglmatch.matcher import Matcher
from kglmatch.options import DEFAULT_MODEL

_COLUMNS = ("vis", "ir")


class Scorer:
    """Scores tables of patch pairs; made for Ray Data, Dask, Spark and Beam.

    It is small until it is first called, and travels by pickle: each process loads the model once.

    Examples:
        >>> dataset.map_batches(Scorer, batch_format="pyarrow", concurrency=4)    # Ray Data
        >>> columns = {"name": "string", "score": "float32", "error": "string"}
        >>> frame.map_partitions(Scorer(), meta=columns)                          # Dask

    Args:
        model: a bundled model, a folder that all processes reach, or a model on the Hub; or a `Model`.
        device, dtype, batch_size: as for `Matcher.from_pretrained`.
    """

    def __init__(
        self,
        model: str | Model = DEFAULT_MODEL,
        *,
        device: str = "auto",
        dtype: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.model = model if isinstance(model, Model) else Model(model, device, dtype, batch_size)
        self._matcher: Matcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "_matcher": None}

    @property
    def matcher(self) -> Matcher:
        """The matcher, loaded on first use."""
        if self._matcher is None:
            self._matcher = self.model.load()
        return self._matcher

    def __call__(self, table: Any) -> Any:
        """Scores a table.

        Args:
            table: an Arrow table, a pandas frame, or a mapping of columns, with columns `vis` and `ir`. A
                patch is an image file or the bytes of its 8-bit pixels, or an array of uint8 or of floats in
                [0, 1]. Further columns are passed on.

        Returns:
            a table of the same kind without `vis` and `ir`, but with `score`, float32 in [0, 1], and `error`,
            text or null. Where there is an error, the score is null (NaN in numpy and pandas).

        Raises:
            DataError: another kind of table, or a column that is missing.
            KGLMatchError: what goes wrong with the model.
        """
        if hasattr(table, "schema") and hasattr(table, "column_names"):  # Arrow
            names = list(table.column_names)
        elif hasattr(table, "columns") and hasattr(table, "drop"):  # pandas
            names = [str(name) for name in table.columns]
        elif isinstance(table, Mapping):
            names = list(table)
        else:
            raise DataError(f"expected a table of Arrow, pandas or a mapping, got a {type(table).__name__}")
        for name in _COLUMNS:
            if name not in names:
                raise DataError(f"the table has no column {name!r}; it has {', '.join(names) or 'none'}")
        sides, errors = [], {}
        for name in reversed(_COLUMNS):
            column = table[name]
            if hasattr(column, "combine_chunks"):
                column = _one_chunk(column)
            patches, wrong = patches_of_column(column, self.matcher.config.patch_size)
            sides.append(patches)
            errors.update({row: f"{name}: {message}" for row, message in wrong.items()})
        ir, vis = sides
        messages = [errors.get(row) for row in range(len(vis))]
        return _with_scores(table, self.score(vis, ir, messages), messages)

    def score(self, vis: NDArray[Any], ir: NDArray[Any], errors: list[str | None]) -> NDArray[np.float32]:
        """Scores of patch pairs (N, P, P), NaN where there is an error; a batch at a time."""
        scores = np.full(len(vis), np.nan, np.float32)
        good = np.flatnonzero([error is None for error in errors])
        size = self.matcher.backend.batch_size
        for start in range(0, len(good), size):
            rows = good[start : start + size]
            scores[rows] = self.matcher.score(vis[rows], ir[rows])
        return scores


def _one_chunk(column: Any) -> Any:
    whole = column.combine_chunks()
    # Older versions of Arrow keep an empty or single chunk as a list of chunks.
    return whole.chunk(0) if hasattr(whole, "num_chunks") and whole.num_chunks == 1 else whole


def _with_scores(table: Any, scores: NDArray[np.float32], errors: list[str | None]) -> Any:
    if isinstance(table, Mapping):
        rest = {name: column for name, column in table.items() if name not in _COLUMNS}
        return {**rest, "score": scores, "error": np.array(errors, object)}
    if hasattr(table, "schema"):
        from kglmatch.batch.arrow import pyarrow

        pa = pyarrow()
        rest = {name: table[name] for name in table.column_names if name not in _COLUMNS}
        columns = {
            **rest,
            "score": pa.array(scores, pa.float32(), mask=np.isnan(scores)),
            "error": pa.array(errors, pa.string()),
        }
        return pa.table(columns)
    frame = table.drop(columns=list(_COLUMNS))
    return frame.assign(score=scores, error=errors).astype({"error": "string"})
