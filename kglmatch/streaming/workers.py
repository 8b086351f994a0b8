"""`Workers`: processes that read images, find keypoints and align, while the network runs in this one."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

from kglmatch.errors import KGLMatchError
from kglmatch.streaming.worker import Failure, call, receive, send

# Not by `multiprocessing`: its children import the user's script, which then needs a guard, and they wait for
# ever where their parent is killed.
_BOOT = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from kglmatch.streaming.worker import serve; serve()"
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_TRIES = 2  # a process may die of what another one does: the system ran out of memory


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Worker processes, started when they are first needed; a context manager.

    Args:
        count: processes; 0 runs everything in this one.

    Raises:
        KGLMatchError: a count below 0.
    """

    def __init__(self, count: int) -> None:
        if count < 0:
            raise KGLMatchError(f"workers must be 0 or more, got {count}")
        self.count = count
        self._lock = threading.Lock()
        self._closed = False
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function that can be imported, in a process that is idle; from any thread.

        Returns:
            what it returns, or a `Failure` where it raised or its process died.
        """
        if not self.count:
            return call(function, *arguments)
        process = self._idle.get()
        try:
            for _ in range(_TRIES):
                process = process or self._start()
                if process is None:
                    break
                try:
                    send(process.stdin, (function, arguments))  # type: ignore[arg-type]
                    return receive(process.stdout)  # type: ignore[arg-type]
                except (OSError, EOFError, ValueError):
                    reason = self._bury(process)
                    process = None
            return Failure("interrupted" if self._closed else f"the process that worked on it {reason}")
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """Ends the processes, also those at work."""
        with self._lock:
            self._closed = True
            processes = list(self._processes)
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()

    def _start(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._closed:
                return None
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **_ONE_THREAD},
                start_new_session=True,  # Ctrl-C is for the process that the user sees
            )
            self._processes.add(process)
        with suppress(OSError):
            pickle.dump(sys.path, process.stdin)  # type: ignore[arg-type]
            process.stdin.flush()  # type: ignore[union-attr]
        return process

    def _bury(self, process: subprocess.Popen[bytes]) -> str:
        """How a process ended."""
        process.kill()
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        code = process.wait()
        with self._lock:
            self._processes.discard(process)
        if code < 0:
            with suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"
