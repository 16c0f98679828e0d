"""A copy of standard output in log.txt."""

import os
import sys
import time


class Logger:
    """Writes to the console and to a file alike."""

    def __init__(self, fpath=None):
        self.console = sys.stdout
        self.file = None
        if fpath:
            os.makedirs(os.path.dirname(fpath) or ".", exist_ok=True)
            self.file = open(fpath, "w", encoding="utf-8")  # noqa: SIM115  (lives as long as the run)

    def write(self, text):
        self.console.write(text)
        if self.file:
            self.file.write(text)

    def flush(self):
        self.console.flush()
        if self.file:
            self.file.flush()

    def close(self):
        """Close the file; the console belongs to the process and stays open."""
        if self.file:
            self.file.close()
            self.file = None

    def __getattr__(self, name):  # isatty, encoding, fileno: as the console says
        return getattr(self.console, name)


def setup_logger(output=None):
    """From here on print() also goes to `output`/log.txt (or to `output` itself when it is a .txt or .log file).

    An existing log is kept: the new one gets the time in its name.
    """
    if output is None:
        return
    path = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
    if os.path.exists(path):
        path += time.strftime("-%Y-%m-%d-%H-%M-%S")
    sys.stdout = Logger(path)
