"""Events on stderr: a live line with a bar and the time left on a terminal, one line per event otherwise."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from autopeft.pipeline.events import Event

__all__ = ["Talk"]


class Talk:
    """Shows the pipeline's events.

    Args:
        quiet: show warnings alone.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._start = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._console: Console | None = None
        self._handler = _ToTalk(self)

    def __enter__(self) -> Talk:
        logging.captureWarnings(True)
        logging.getLogger("autopeft").addHandler(self._handler)
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._console = Console(stderr=True)
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("autopeft").removeHandler(self._handler)
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if event.kind == "warning":
            self.line(f"warning: {event.text}")
        elif self._quiet:
            return
        elif event.kind == "progress":
            self._progress(event)
        else:
            self.line(f"[{time.monotonic() - self._start:6.1f} s] {event.text}")

    def line(self, text: str) -> None:
        """One line on stderr, above the bar when there is one."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _progress(self, event: Event) -> None:
        if self._bar is None:
            return
        if self._task is None:
            self._task = self._bar.add_task(event.text, total=event.total or None)
        self._bar.update(self._task, description=event.text, completed=event.done, total=event.total or None)


class _ToTalk(logging.Handler):
    """Warnings of the library, shown like events."""

    def __init__(self, talk: Talk) -> None:
        super().__init__(logging.WARNING)
        self._talk = talk

    def emit(self, record: logging.LogRecord) -> None:
        self._talk.line(f"warning: {record.getMessage()}")
