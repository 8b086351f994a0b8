"""A worker process: runs one function after another, as asked over its standard input.

Messages are pickles of protocol 5 whose arrays travel as they are, behind them. A worker ends when its
input does, so that none outlives the process that started it, however that one ends.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from kglmatch.errors import KGLMatchError

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Failure:
    """Why a task has no answer, in one line."""

    message: str


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or a `Failure`. A batch does not end for what one pair holds."""
    try:
        return function(*arguments)
    except KGLMatchError as error:
        return Failure(str(error))
    except MemoryError:
        return Failure("out of memory")
    except Exception as error:
        return Failure(f"{type(error).__name__}: {' '.join(str(error).split())}")


def send(stream: BinaryIO, value: Any) -> None:
    """Writes one message."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts: list[bytes | memoryview] = [head, *(buffer.raw() for buffer in buffers)]
    stream.write(b"".join(_LENGTH.pack(n) for n in (len(parts), *(len(part) for part in parts))))
    for part in parts:
        stream.write(part)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Reads one message. Raises `EOFError` where the stream ends, also in the middle of it."""
    (count,) = _LENGTH.unpack(_read(stream, _LENGTH.size))
    lengths = _read(stream, count * _LENGTH.size)
    parts = [_read(stream, length) for (length,) in _LENGTH.iter_unpack(lengths)]
    return pickle.loads(parts[0], buffers=parts[1:])


def _read(stream: BinaryIO, length: int) -> bytearray:
    data = bytearray(length)
    view, filled = memoryview(data), 0
    while filled < length:
        count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the other process ended")
        filled += count
    return data


def serve() -> None:
    """Answers requests, (function, arguments), until there are no more."""
    import cv2

    cv2.setNumThreads(1)  # as many processes run as there are processors
    # What libraries print must not get between the messages.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        while True:
            function, arguments = receive(sys.stdin.buffer)
            send(answers, call(function, *arguments))
    except (EOFError, BrokenPipeError):
        os._exit(0)  # nobody is left who could be written to, also not by a flush at exit
