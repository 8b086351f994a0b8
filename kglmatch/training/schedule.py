"""Learning rate over a run, as a factor of the configured rate."""

from __future__ import annotations

import math

_FLOOR = 0.002  # the last steps still move a little
_ONE_CYCLE_START = 0.04
_ONE_CYCLE_TOP = 0.3  # share of the run


def rate_factor(
    step: int, steps: int | None, schedule: str, *, warmup_steps: int = 0, decay_fraction: float = 0.4
) -> float:
    """Factor of the learning rate at a step (0 .. steps - 1).

    Args:
        step: batches done so far.
        steps: length of the run; None if it is not known yet, which gives the factor of a run's begin.
        schedule: "constant"; "decay", constant and then a cosine over the last `decay_fraction`;
            "cosine" over the whole run; "one-cycle", up over the first 30 % and down again.
        warmup_steps: linear rise before all but one-cycle.

    Returns:
        a factor in (0, 1].
    """
    done = 0.0 if steps is None else step / steps
    if schedule == "one-cycle":
        if done < _ONE_CYCLE_TOP:
            return _ONE_CYCLE_START + (1 - _ONE_CYCLE_START) * (1 - _cosine_fall(done / _ONE_CYCLE_TOP))
        return max(_FLOOR, _cosine_fall((done - _ONE_CYCLE_TOP) / (1 - _ONE_CYCLE_TOP)))
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    fraction = {"constant": 0.0, "decay": decay_fraction, "cosine": 1.0}[schedule]
    if done <= 1 - fraction:
        return warm
    return warm * max(_FLOOR, _cosine_fall((done - (1 - fraction)) / fraction))


def _cosine_fall(x: float) -> float:
    """1 at 0, 0 at 1, half a cosine between."""
    return 0.5 * (1 + math.cos(math.pi * x))
