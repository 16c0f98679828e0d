"""A copy of standard output in log.txt."""

import os
import sys
import time
from contextlib import contextmanager


class Logger:
    """Writes to the console and to a file alike."""

    def __init__(self, fpath=None):
        self.console = sys.stdout
        self.file = None
        if fpath:
            os.makedirs(os.path.dirname(fpath) or ".", exist_ok=True)
            # lives as long as the run, each line of it outlives a kill
            self.file = open(fpath, "w", buffering=1, encoding="utf-8")  # noqa: SIM115

    def write(self, text) -> None:
        try:
            self.console.write(text)
        except UnicodeEncodeError:  # a console that knows ASCII alone
            self.console.write(text.encode("ascii", "backslashreplace").decode())
        self.note(text)

    def note(self, text) -> None:
        """Write to the file alone."""
        if self.file:
            with self._naming():
                self.file.write(text)

    def flush(self) -> None:
        self.console.flush()
        if self.file:
            with self._naming():
                self.file.flush()

    def close(self) -> None:
        """Close the file; the console belongs to the process and stays open."""
        file, self.file = self.file, None
        if file:
            with self._naming(file.name):
                file.close()

    @contextmanager
    def _naming(self, path=None):
        """A disk that is full says so with the file's name."""
        try:
            yield
        except OSError as error:
            path = path or self.file.name
            raise type(error)(
                f"cannot write {path} ({error.strerror}): make room or set another --output-dir"
            ) from None

    def __getattr__(self, name):  # isatty, encoding, fileno: as the console says
        return getattr(self.console, name)


def setup_logger(output=None) -> None:
    """From here on print() also goes to `output`/log.txt (or to `output` itself when it is a .txt or .log file).

    An existing log is kept: the new one gets the time in its name, and a number if there are several of one second.
    """
    if output is None:
        return
    path = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
    if os.path.exists(path):
        path = stem = path + time.strftime("-%Y-%m-%d-%H-%M-%S")
        number = 1
        while os.path.exists(path):
            number += 1
            path = f"{stem}-{number}"
    sys.stdout = Logger(path)
