"""The lines of JSON that a run appends to, and knows again after a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS, TRUTHS, SCENES = "results.jsonl", "truths.jsonl", "scenes.jsonl"
RIGHT = 5.0  # pixels: a registration that is nearer to the truth is right

Row = dict[str, Any]


class Results:
    """Lines of JSON that are appended to, and known again after a restart."""

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path = path
        self.keys = keys
        self.rows: list[Row] = read_lines(path)
        self._known = {self._key(row): row for row in self.rows}

    def _key(self, row: Row) -> tuple[str, ...]:
        return tuple(str(row[key]) for key in self.keys)

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return key in self._known

    def __getitem__(self, key: tuple[str, ...]) -> Row:
        return self._known[key]

    def add(self, rows: list[Row]) -> None:
        """Appends lines, all of them in one piece."""
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        self.rows += rows
        self._known |= {self._key(row): row for row in rows}


def read_lines(path: Path) -> list[Row]:
    """The rows of a file of results; a last line that a kill cut short is removed."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]
