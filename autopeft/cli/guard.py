"""Errors to one sentence and an exit code."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import typer

from autopeft.errors import AutopeftError

__all__ = ["guarded"]

P = ParamSpec("P")
R = TypeVar("R")


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Run a command; what it raises on purpose becomes one sentence on stderr and the error's exit code.

    Anything else is a bug: the traceback goes to a file, and the sentence says where. With `AUTOPEFT_DEBUG=1` it is
    raised as it is.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except AutopeftError as error:
            _say(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _say("interrupted; run the same command again to continue")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader of stdout went away, as `head` does; that is its right.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            _say(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
            raise typer.Exit(6) from None
        except typer.Exit:
            raise
        except Exception as error:
            # The outermost frame: a bug must still end in one sentence.
            if os.environ.get("AUTOPEFT_DEBUG"):
                raise
            where = _keep_traceback()
            _say(f"unexpected {type(error).__name__}: {error}. This is a bug; the traceback is in {where}")
            raise typer.Exit(1) from None

    return run


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)


def _keep_traceback() -> str:
    path = Path(tempfile.gettempdir()) / f"autopeft-traceback-{os.getpid()}.log"
    try:
        path.write_text(traceback.format_exc())
    except OSError:
        return "no file (nothing is writable); set AUTOPEFT_DEBUG=1 to see it"
    return str(path)
