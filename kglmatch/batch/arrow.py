"""Apache Arrow, which comes with the extra `many`."""

from __future__ import annotations

import importlib
from typing import Any

from kglmatch.errors import KGLMatchError


def pyarrow() -> Any:
    """The module `pyarrow`. Raises `KGLMatchError` where it is not installed."""
    return _load("pyarrow")


def pyarrow_parquet() -> Any:
    """The module `pyarrow.parquet`. Raises `KGLMatchError` where it is not installed."""
    return _load("pyarrow.parquet")


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise KGLMatchError('tables need pyarrow: pip install "kglmatch[many]"') from error
