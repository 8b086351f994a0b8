"""The command line of kglmatch: found, built, run, and what it says. Imports nothing of QGIS's."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "KGLMATCH"  # of the environment: the program
PROGRAM = "kglmatch"
MODELS = (
    "kglnet-vis-nir",
    "kglnet-vis-nir-plus",
    "kglnet-vis-lwir",
    "kglnet-vis-sar",
    "kglnet-vis-nir-lite",
    "kglnet-vis-lwir-lite",
    "kglnet-vis-sar-lite",
    "kglnet-vis-nir-open",
    "kglnet-vis-nir-open-lite",
    "kglnet-vis-sar-open",
)
KINDS = ("auto", "translation", "similarity", "affine", "homography")
UNITS = ("pixels", "metres")

SUCCESS, FAILED, MISTAKE = 0, 1, 2  # exit codes

_ERROR = "kglmatch: error: "
_PROGRESS = re.compile(r"kglmatch: progress: (\S+) (\d+)/(\d+)\s*")
# Where each stage is within the whole, percent. What a run does not need is skipped.
_STAGES = {"tiles": (10.0, 80.0), "write": (80.0, 100.0)}
# QGIS sets these for its own Python, GDAL and PROJ; those of another environment would load the wrong files.
_OF_QGIS = (
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "GDAL_DATA",
    "GDAL_DRIVER_PATH",
    "PROJ_DATA",
    "PROJ_LIB",
)
_REMOTE = (
    "/vsicurl",
    "/vsis3",
    "/vsigs",
    "/vsiaz",
    "/vsiadls",
    "/vsioss",
    "/vsiswift",
    "/vsihdfs",
    "/vsiwebhdfs",
)
_POLL = 0.1  # seconds between two looks at whether the user cancelled
_PATIENCE = 5.0  # seconds that a cancelled program has to clear up


class CommandError(Exception):
    """What to say to the user, in one line."""


class Cancelled(Exception):
    """The user stopped the program."""


@dataclass(frozen=True)
class Finished:
    """A program that has ended.

    Attributes:
        code: its exit code.
        result: the JSON object that it printed; empty where it printed none.
        messages: the lines that it wrote to stderr, without those of progress.
    """

    code: int
    result: dict[str, Any]
    messages: list[str]


# --- the program --------------------------------------------------------------------------------------


def find_program(setting: str = "", environment: Mapping[str, str] | None = None) -> str:
    """The program: of Processing's setting, else of the variable KGLMATCH, else the one on PATH.

    Raises:
        CommandError: it is not there; the message says how to name it.
    """
    environment = os.environ if environment is None else environment
    for value, where in (
        (setting, "the setting"),
        (environment.get(VARIABLE, ""), f"the variable {VARIABLE}"),
    ):
        text = value.strip().strip('"')
        if not text:
            continue
        text = str(Path(text).expanduser())
        found = shutil.which(text, path=environment.get("PATH"))
        if found is None:
            raise CommandError(f"{text}, which {where} names as the kglmatch program, is no program")
        return found
    found = shutil.which(PROGRAM, path=environment.get("PATH"))
    if found is None:
        raise CommandError(
            'the program kglmatch is not on PATH: install it (pip install "kglmatch[geo]") and name it in '
            f"Settings > Options > Processing > Providers > kglmatch, or by the variable {VARIABLE}"
        )
    return found


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the program: without what QGIS sets for itself, with progress as lines."""
    kept = dict(os.environ if environment is None else environment)
    for name in _OF_QGIS:
        kept.pop(name, None)
    kept.update(KGLMATCH_PROGRESS="lines", PYTHONUNBUFFERED="1", PYTHONIOENCODING="utf-8")
    return kept


# --- its arguments ------------------------------------------------------------------------------------


def local_file(provider: str, source: str, name: str) -> str:
    """The file of a raster layer.

    Args:
        provider: name of its data provider.
        source: its source as QGIS writes it.
        name: of the layer.

    Raises:
        CommandError: the layer has none: a web service, a database, or a file that is gone.
    """
    way_out = "export it as a GeoTIFF (Export > Save As) and take that"
    if provider != "gdal":
        raise CommandError(f"the layer {name} has no local file (its provider is {provider}): {way_out}")
    path = source.split("|", 1)[0]
    if path.startswith(_REMOTE) or re.match(r"[a-z0-9+]+://", path, re.IGNORECASE):
        raise CommandError(f"the layer {name} is read over the network: {way_out}")
    if path.startswith("/vsi") or Path(path).is_file():
        return path
    raise CommandError(f"the layer {name} has no local file ({path[:100]}): {way_out}")


def length(value: float | None, unit: str) -> str | None:
    """`--max-displacement` of a number and its unit; None for any."""
    if value is None:
        return None
    return f"{value:.12g}{'m' if unit == 'metres' else ''}"


def arguments(command: str, vis: str, ir: str, options: Mapping[str, Any]) -> list[str]:
    """The arguments of a command, without the program.

    Args:
        command: "register" or "check".
        vis, ir: files.
        options: name of an option without its dashes -> its value; None and False leave it out, True gives
            it without a value.
    """
    given = [command, vis, ir, "--json"]
    for option, value in options.items():
        if value is None or value is False or value == "":
            continue
        # In one argument, so that a value that begins with a dash is no option.
        flag = f"{'-' if len(option) == 1 else '--'}{option}"
        if value is True:
            given.append(flag)
        elif len(option) == 1:
            given += [flag, str(value)]
        else:
            given.append(f"{flag}={value}")
    return given


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


# --- a run --------------------------------------------------------------------------------------------


def run(
    command: Sequence[str],
    *,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[float], None] = lambda percent: None,
    cancelled: Callable[[], bool] = lambda: False,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Runs the program to its end.

    Args:
        command: program and arguments.
        say: is called with each line of stderr as it comes.
        advance: is called with the percentage that is done.
        cancelled: is asked ten times a second; once it says yes, the program is stopped with all its
            processes.
        environment: in place of `child_environment()`.

    Raises:
        Cancelled: the user stopped it.
        CommandError: it cannot be started.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    messages: list[str] = []
    with tempfile.TemporaryFile() as stdout:
        process = _start(command, stdout, child_environment() if environment is None else environment)
        reader = threading.Thread(target=_read_lines, args=(process.stderr, lines), daemon=True)
        reader.start()
        try:
            while True:
                if cancelled():
                    raise Cancelled()
                with contextlib.suppress(queue.Empty):
                    line = lines.get(timeout=_POLL)
                    if line is None:
                        break
                    percent = progress_of(line)
                    if percent is not None:
                        advance(percent)
                    elif line:
                        messages.append(line)
                        say(line)
            while process.poll() is None:
                if cancelled():
                    raise Cancelled()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
        finally:
            _stop(process)
            reader.join(_PATIENCE)
        stdout.seek(0)
        text = stdout.read().decode("utf-8", "replace")
    return Finished(process.returncode, result_of(text), messages)


def _start(command: Sequence[str], stdout: Any, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    options: dict[str, Any] = {"start_new_session": True}  # so that all its processes can be stopped
    if os.name == "nt":
        flags = getattr(subprocess, "CREATE_NO_WINDOW", 0) | getattr(
            subprocess, "CREATE_NEW_PROCESS_GROUP", 0
        )
        options = {"creationflags": flags}
    try:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=dict(environment),
            **options,
        )
    except OSError as error:
        raise CommandError(f"cannot start {command[0]}: {error.strerror or error}") from None


def _read_lines(stream: Any, lines: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            # A bar that redraws itself ends in a carriage return.
            lines.put(line.decode("utf-8", "replace").rstrip("\r\n").split("\r")[-1].rstrip())
    lines.put(None)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a program that still runs, with its own processes: as Ctrl-C does, then without asking."""
    if process.poll() is not None:
        return
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
        process.wait()
        return
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
            return
    process.wait()


# --- what it says -------------------------------------------------------------------------------------


def progress_of(line: str) -> float | None:
    """How much is done, percent, of a line such as "kglmatch: progress: tiles 12/64"; None of any other."""
    found = _PROGRESS.fullmatch(line)
    if found is None:
        return None
    low, high = _STAGES.get(found[1], (0.0, 10.0))
    return low + (high - low) * min(1.0, int(found[2]) / max(int(found[3]), 1))


def result_of(text: str) -> dict[str, Any]:
    """The JSON object of stdout; empty where there is none."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                return value
    return {}


def problem_of(finished: Finished) -> str | None:
    """What to say of a program that did not succeed, in one line; None of one that did, or gave a verdict."""
    if finished.code in (SUCCESS, FAILED) and finished.result:
        return None
    errors = [line[len(_ERROR) :] for line in finished.messages if line.startswith(_ERROR)]
    if errors:
        return errors[-1]
    last = f": {finished.messages[-1]}" if finished.messages else ""
    if finished.code < 0:
        return f"kglmatch was ended by signal {-finished.code}{last}"
    if finished.code == SUCCESS:
        return f"kglmatch printed no result{last}"
    return f"kglmatch ended with exit code {finished.code}{last}"


def summary(result: Mapping[str, Any]) -> str:
    """The result of a registration or a check in one line."""
    parts = [str(result.get("verdict"))]
    if result.get("confidence") is not None:
        parts.append(f"confidence {result['confidence']:.2f}")
    if result.get("shift_metres"):
        east, north = result["shift_metres"]
        parts.append(
            f"moved by {abs(east):.2f} m {'east' if east >= 0 else 'west'} and {abs(north):.2f} m "
            f"{'north' if north >= 0 else 'south'}"
        )
    if result.get("median_error") is not None:
        parts.append(f"median displacement {result['median_error']:.2f} px")
    return ", ".join(parts)
