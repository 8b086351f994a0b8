"""Learning rate over a run, as a factor of the configured rate."""

from __future__ import annotations

import math


def rate_factor(
    step: int, steps: int, schedule: str, *, warmup_steps: int = 0, decay_fraction: float = 0.4
) -> float:
    """Factor of the learning rate at a step (0 .. steps - 1).

    Args:
        schedule: "constant"; "decay", constant and then a cosine over the last `decay_fraction`;
            "cosine" over the whole run; "one-cycle", up over the first 30 % and down again.
        warmup_steps: linear rise before all but one-cycle.

    Returns:
        a factor in (0, 1].
    """
    floor = 0.002  # the last steps still move a little
    if schedule == "one-cycle":
        top = max(1.0, 0.3 * steps)
        if step < top:
            return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * step / top))
        return max(floor, 0.5 * (1 + math.cos(math.pi * (step - top) / max(1.0, steps - top))))
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    fraction = {"constant": 0.0, "decay": decay_fraction, "cosine": 1.0}[schedule]
    start = steps * (1 - fraction)
    if step < start or fraction == 0:
        return warm
    return warm * max(floor, 0.5 * (1 + math.cos(math.pi * (step - start) / max(1.0, steps - start))))
