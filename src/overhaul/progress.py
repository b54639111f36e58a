"""Progress on stderr: a bar with the time left on a terminal, a plain line every few seconds elsewhere; Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 10.0


def say(message: str) -> None:
    """One line on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


class Bar:
    """Counts to `total`: `with Bar("training", 100) as bar: bar.step("loss 2.31")`."""

    def __init__(self, title: str, total: int, *, done: int = 0, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.quiet = title, total, done, quiet
        self.began = self.last_line = time.monotonic()
        self.at_start = done
        self.rich: Progress | None = None
        if not quiet and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.rich = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self.task = self.rich.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> Bar:
        if self.rich:
            self.rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.rich:
            self.rich.stop()

    def step(self, note: str = "") -> None:
        """One more is done; `note` is shown beside it."""
        self.done += 1
        if self.rich:
            self.rich.update(self.task, completed=self.done, note=note)
            return
        now = time.monotonic()
        if self.quiet or (now - self.last_line < LINE_EVERY_SECONDS and self.done < self.total):
            return
        self.last_line = now
        left = (now - self.began) / (self.done - self.at_start) * (self.total - self.done)
        say(f"{self.title} {self.done}/{self.total}  {note}  {left:.0f} s left".replace("    ", "  "))


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event that is looked at after the step; the second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
