"""The command line: one file a command, loaded only when it is called.

A command parses, calls one function and prints. `--help` imports neither torch nor onnx.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import warnings
from contextlib import suppress

import click

from sdcompress import __version__, registry
from sdcompress.errors import SdcompressError


class Commands(click.Group):
    """A group whose commands are the modules of this folder."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in _ORDER if name in registry.names("commands")] + [
            name for name in registry.names("commands") if name not in _ORDER
        ]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in registry.names("commands"):
            return None
        command: click.Command = registry.load("commands", name).command
        return command


# The order of the work, which is the order a newcomer reads them in.
_ORDER = [
    "run",
    "plan",
    "latency",
    "prune",
    "tune",
    "eval",
    "sweep",
    "search",
    "export",
    "build",
    "verify",
    "bench",
    "device",
    "gate",
    "report",
    "generate",
    "pack",
    "unpack",
    "list",
    "doctor",
]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdcompress")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Prune a Stable Diffusion 2 pipeline, export it, prove the zeros, measure what they bring.

    \b
    Everything in one go, on the small model that comes with the package:
      sdcompress run edge -o out
    """


def main() -> None:
    """The entry point: errors become one line on stderr and an exit code."""
    debug = "--debug" in sys.argv
    if not debug:  # libraries' remarks on their own imports are no part of our output
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        warnings.showwarning = _warn
    _keep_freed_memory()
    # Whoever stops a container sends SIGTERM; half-made work is cleared up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail(_interrupted(sys.argv[1:]), 130)
    except SdcompressError as e:
        if debug:
            raise
        _fail(str(e), e.exit_code)
    except Exception as e:
        if debug:
            raise
        _fail(_unexpected(e), 1)


# Of malloc.h of glibc, and the bytes: several times what is made of one slice of a tensor.
_M_TRIM_THRESHOLD, _TRIM = -1, 1 << 26
_M_MMAP_THRESHOLD, _MMAP = -3, 1 << 23


def _keep_freed_memory() -> None:
    """Let malloc keep some of what is freed, for the next slice: to get it from the system again
    takes a fault for every page, a hundred thousand of them for a large model."""
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _TRIM)
        mallopt(_M_MMAP_THRESHOLD, _MMAP)


def _warn(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """One line, without the place in the source that a library's reader would want."""
    click.echo(f"sdcompress: warning: {message}", err=True)


def _interrupted(arguments: list[str]) -> str:
    command = next((a for a in arguments if not a.startswith("-")), "")
    goes_on = {
        "run": "; the same command goes on from the last finished stage",
        "tune": "; the same command goes on from the last checkpoint",
        **dict.fromkeys(("eval", "sweep", "search"), "; the same command goes on where it was"),
    }
    more = goes_on.get(command, "")
    return f"interrupted; nothing was half-written{more}"


_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def _unexpected(error: BaseException) -> str:
    cause: BaseException | None = error
    stated = True  # and not merely an error that was being handled, which mostly is no reason
    while cause:  # libraries wrap the system's answer in errors of their own
        if isinstance(cause, OSError) and cause.strerror:
            place = f"{cause.filename}: " if cause.filename else ""
            if cause.errno in _NO_SPACE:
                limit = ", or raise the limit of `ulimit -f`" if cause.errno == errno.EFBIG else ""
                return f"{place}{cause.strerror}; free some space{limit}"
            if stated:
                return f"{place}{cause.strerror}; check the path and its permissions"
        if isinstance(cause, MemoryError):
            return "out of memory; close other programs or use a smaller model"
        stated = stated and cause.__cause__ is not None
        hidden = None if cause.__suppress_context__ else cause.__context__
        cause = cause.__cause__ or hidden
    text = " ".join(str(error).split()) or "no message"
    return (
        f"{type(error).__name__}: {text:.300}; this is a bug or a broken file, --debug shows where"
    )


def _fail(message: str, code: int) -> None:
    click.echo(f"sdcompress: {message}", err=True)
    sys.exit(code)
