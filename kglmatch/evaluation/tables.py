"""Text tables of the reports."""

from __future__ import annotations


def aligned(rows: list[list[str]], rules: tuple[int, ...]) -> str:
    """Rows as lines, the first column to the left and the others to the right, rules before some rows."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    for rule in sorted(rules, reverse=True):
        lines.insert(rule, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)
