"""Signs of life in long work: a bar on a terminal; elsewhere a line for each thing begun, and one every ten seconds."""

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

EVERY = 10.0  # seconds


class Steps:
    """Says what is being done, of `total` steps in all, whatever standard output is redirected to meanwhile.

    with Steps(3) as steps:
        steps.say("CoOp: training")
        steps.advance()
    """

    def __init__(self, total: int, every: float = EVERY):
        self.total, self.every, self.done, self.what, self.since = total, every, 0, "", time.monotonic()
        self.console, self.bar = Console(file=sys.stdout), None
        self.ended = threading.Event()
        self.beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Steps":
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        else:
            self.beating.start()
        return self

    def __exit__(self, *failure) -> None:
        self.ended.set()
        if self.bar:
            self.bar.stop()
        else:
            self.beating.join()

    def say(self, what: str) -> None:
        """Name what begins now."""
        self.what, self.since = what, time.monotonic()
        if self.bar:
            self.bar.update(self.task, description=what)
        else:
            self._print(f"[{self.done + 1}/{self.total}] {what}")

    def advance(self) -> None:
        """One of the steps is done."""
        self.done += 1
        if self.bar:
            self.bar.advance(self.task)

    def _beat(self):
        while not self.ended.wait(self.every):
            self._print(f"[{self.done + 1}/{self.total}] {self.what} … {time.monotonic() - self.since:.0f} s")

    def _print(self, line):
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self.console.file.flush()
