"""The command line: `kglmatch COMMAND ...`. Results go to stdout, messages to stderr."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from kglmatch import __version__
from kglmatch.errors import KGLMatchError

# Modules of `kglmatch.commands`, in the order in which --help lists them.
COMMANDS = (
    "match",
    "register",
    "verify",
    "check",
    "rig",
    "apply",
    "score",
    "match-many",
    "register-many",
    "score-many",
    "export",
    "eval",
    "train",
    "info",
    "convert",
)

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_MISTAKE, f"kglmatch: error: {message} (see {self.prog} --help)\n")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line; imports nothing heavy.

    Args:
        command: the only one to be parsed, which is loaded alone; None, or what is no command, takes all.
    """
    parser = _Parser(
        prog="kglmatch",
        description="Match image patches and whole images across spectra: visible against near infrared, "
        "thermal or radar.",
    )
    parser.add_argument("--version", action="version", version=f"kglmatch {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in (command,) if command in COMMANDS else COMMANDS:
        path = f"kglmatch.commands.{name.replace('-', '_')}"
        if importlib.util.find_spec(path) is None:
            continue
        module: ModuleType = importlib.import_module(path)
        module.add_parser(subparsers)
        subparsers.choices[name].set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        the exit code: 0, 1 where `register`, `verify` or `check` says "failed", 2 for a user's mistake (one
        line on stderr), 130 after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names that the terminal cannot show
    try:
        given = sys.argv[1:] if argv is None else argv
        args = build_parser(given[0] if given else None).parse_args(given)
        args.command_line = ["kglmatch", *given]
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_MISTAKE
    except KGLMatchError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("kglmatch: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _abandon_stdout()  # the reader (head, less) went away
        return 0
    except OSError as error:
        _abandon_stdout()
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return _fail("out of memory; try a smaller --batch-size or --max-keypoints")


def _fail(message: str) -> int:
    print(f"kglmatch: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_MISTAKE


def _is_out_of_memory(error: BaseException) -> bool:
    # PyTorch raises a RuntimeError of its own on CUDA, and a plain one on the CPU.
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(part in str(error) for part in texts)


def _abandon_stdout() -> None:
    """Lets Python flush stdout into nothing at exit, where it would complain once more."""
    try:
        descriptor = sys.stdout.fileno()
    except io.UnsupportedOperation:
        return  # a stand-in without a file below
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)
