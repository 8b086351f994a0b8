"""`Prefetch`: answers in the order of the questions, made ahead by workers, in bounded memory."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np

from kglmatch.streaming.workers import Workers

K = TypeVar("K")

Task = tuple[K, Callable[..., Any], tuple[Any, ...]]

BUDGET = 256 << 20  # bytes of answers that wait, and of images that were given as arrays
MOST = 256  # tasks taken ahead
_STEP = 2  # tasks taken for each answer that leaves, until there are enough: a slow source delays no answer


class Prefetch(Generic[K]):
    """Runs tasks ahead of the one that reads their answers.

    The tasks are drawn by the thread that takes the answers, and only as far ahead as memory allows.

    Args:
        tasks: (key, function, arguments); what they raise is raised once the answers before it are taken.
        workers: run the functions.
        budget: bytes; beyond it only the answer that is next in turn is made.
    """

    def __init__(self, tasks: Iterator[Task[K]], workers: Workers, *, budget: int = BUDGET) -> None:
        self._tasks, self._workers, self._budget = tasks, workers, budget
        self._flying: deque[tuple[K, Future[Any]]] = deque()
        self._threads = ThreadPoolExecutor(max(1, workers.count), thread_name_prefix="kglmatch")
        self._changed = threading.Condition()
        self._held = 0
        self._first = 0  # number of the task whose answer is next
        self._drawn = 0
        self._closed = False
        self._end: Exception | None = None

    def take(self, *, wait: bool = True) -> tuple[K, Any] | None:
        """The next key and answer; None at the end, or, without `wait`, where the answer is not there yet.

        Raises:
            what the tasks raised, if all answers before it are taken and it is waited for.
        """
        self._draw()
        if not self._flying:
            if wait and self._end is not None and not isinstance(self._end, StopIteration):
                raise self._end
            return None
        key, future = self._flying[0]
        if not wait and not future.done():
            return None
        answer = future.result()
        self._flying.popleft()
        with self._changed:
            self._held -= size_of(answer)
            self._first += 1
            self._changed.notify_all()
        return key, answer

    def close(self) -> None:
        """Drops what is not taken yet. The workers stay."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._flying.clear()

    def _draw(self) -> None:
        room = _STEP if self._drawn else self._workers.count + _STEP
        while room and self._end is None and self._may_draw():
            room -= 1
            try:
                key, function, arguments = next(self._tasks)
            except Exception as error:  # the end of the tasks, or what their source raised
                self._end = error
                return
            size = size_of(arguments)
            with self._changed:
                self._held += size
            self._flying.append(
                (key, self._threads.submit(self._run, self._drawn, size, function, arguments))
            )
            self._drawn += 1

    def _may_draw(self) -> bool:
        ahead = len(self._flying)
        return ahead <= self._workers.count or (ahead < MOST and self._held < self._budget)

    def _run(self, number: int, size: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._held < self._budget or number == self._first)
        if self._closed:
            return None
        answer = self._workers.run(function, *arguments)
        with self._changed:
            self._held += size_of(answer) - size
            self._changed.notify_all()
        return answer


def size_of(value: Any) -> int:
    """Bytes of the arrays in tuples, lists, dictionaries and data classes."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, tuple | list):
        return sum(map(size_of, value))
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return sum(size_of(getattr(value, field.name)) for field in dataclasses.fields(value))
    return 0
