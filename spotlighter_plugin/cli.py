"""The command `spotlighter`: each command imports what it needs when it is called."""

import importlib
import os
import platform
import sys

import typer
from rich.console import Console
from rich.table import Table

from .forks import attach
from .forks import run as run_fork
from .workbench.pictures import visualize
from .workbench.reports import report
from .workbench.speed import bench
from .workbench.sweeps import ablate, sweep

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Token selection and a class memory for CLIP prompt tuning.",
)


@app.callback()
def _commands():
    """Token selection and a class memory for CLIP prompt tuning."""


@app.command()
def demo(root: str = "data", seed: int = 1):
    """CoOp with and without Spotlighter on the bundled pictures: one table, a few minutes on two cores."""
    from .workbench.demo import run

    run(root, seed)


@app.command()
def doctor():
    """Check what this installation needs: versions, imports, bundled weights, the device."""
    table, sound = Table("check", "found", "", title="spotlighter doctor"), True
    for name, look in CHECKS.items():
        try:
            found, mark = look(), "[green]ok"
        except Exception as error:
            found, mark, sound = " ".join(f"{type(error).__name__}: {error}".split())[:100], "[red]missing", False
        table.add_row(name, found, mark)
    Console().print(table)
    if not sound:
        raise ValueError("something is missing; `make demo` installs everything")


def _torch():
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.__version__}, {', '.join(devices) or f'CPU, {torch.get_num_threads()} threads'}"


def _version(module):
    return lambda: getattr(importlib.import_module(module), "__version__", "yes")


def _dassl():
    import dassl

    from . import compat

    return f"{dassl.__version__} ({'installed' if compat.real_dassl() else 'our own part of its interface'})"


def _bundled(name):
    def look():
        from .towers.clip import load_clip

        return f"{sum(p.numel() for p in load_clip(name).parameters()):,} parameters"

    return look


app.command("sweep", cls=sweep.ListOptions)(sweep.command)
app.command("ablate", cls=sweep.ListOptions)(ablate.command)
app.command("report")(report.command)
app.command("bench")(bench.command)
app.add_typer(visualize.app, name="visualize")
app.command("attach")(attach.command)
app.command("run", context_settings={"ignore_unknown_options": True})(run_fork.command)

CHECKS = {
    "python >= 3.10": platform.python_version,
    "torch": _torch,
    "torchvision": _version("torchvision"),
    "clip": _version("clip"),
    "dassl": _dassl,
    "tiny CLIP": _bundled("tiny"),
    "micro CLIP": _bundled("micro"),
}


def main(argv=None):
    """Run a command; a mistake is one line on standard error and exit code 1 (SPOTLIGHTER_DEBUG=1: a traceback)."""
    try:
        app(args=argv, prog_name="spotlighter")
    except Exception as error:
        from .errors import one_line

        line = one_line(error)
        if line is None or os.environ.get("SPOTLIGHTER_DEBUG"):
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)
