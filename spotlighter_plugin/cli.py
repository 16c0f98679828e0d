"""The command `spotlighter`: what a command needs is imported when it is called."""

import importlib
import os
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

COMMANDS = {  # name: the module whose `app` it is, what --help says
    "train": ("workbench.photos.train", "Train on a folder of your own pictures, a folder for each class."),
    "predict": ("workbench.photos.predict", "Name what is on pictures, with what was trained."),
    "sweep": ("workbench.sweeps.sweep", "Run a whole protocol: skip what is complete, resume what was killed."),
    "ablate": ("workbench.sweeps.ablate", "Run one ablation of the paper and print its table."),
    "report": ("workbench.reports.report", "The paper's tables over seeds, beside the paper's figures."),
    "evidence": ("workbench.evidence.command", "The table of evidence: a host, its controls and Spotlighter."),
    "bench": ("workbench.speed.bench", "Time a host with and without Spotlighter, in turn, on random weights."),
    "visualize": ("workbench.pictures.visualize", "Pictures: lit tokens, embeddings, curves."),
    "attach": ("forks.attach", "Put Spotlighter into a fork: a trainer, its configuration, a few lines in train.py."),
    "run": ("forks.run", "Run a fork's train.py with Spotlighter's trainer at hand, without a change to the fork."),
}


class Later(TyperCommand):
    """A command whose module is imported when it is called, not when it is listed."""

    def make_context(self, info_name, args, parent=None, **extra) -> typer.Context:
        module = importlib.import_module(f".{COMMANDS[self.name][0]}", __package__)
        return typer.main.get_command(module.app).make_context(info_name, args, parent, **extra)


class Commands(TyperGroup):
    """The commands of this file and, later, those of the others."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.commands |= {name: Later(name, help=text) for name, (_, text) in COMMANDS.items()}


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Token selection and a class memory for CLIP prompt tuning.",
)


@app.callback()
def _commands():
    """Token selection and a class memory for CLIP prompt tuning."""


@app.command()
def demo(
    root: Annotated[Path, typer.Option(help="where pictures are drawn")] = Path("data"),
    seed: Annotated[int, typer.Option(help="of shots and training")] = 1,
    output: Annotated[Path, typer.Option(help="folder of the table and the logs")] = Path("output/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="to see that it runs: no real figures")] = False,
) -> None:
    """CoOp with and without Spotlighter on the bundled pictures: one table, a few minutes on two cores."""
    from .workbench.demo import run

    run(str(root), seed, output, quick)


@app.command()
def doctor() -> None:
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


CHECKS = {
    "python >= 3.10": platform.python_version,
    "torch": _torch,
    "torchvision": _version("torchvision"),
    "clip": _version("clip"),
    "dassl": _dassl,
    "tiny CLIP": _bundled("tiny"),
    "micro CLIP": _bundled("micro"),
}


def main(argv=None) -> None:
    """Run a command; a mistake is one line on standard error and exit code 1 (SPOTLIGHTER_DEBUG=1: a traceback)."""
    try:
        app(args=argv, prog_name="spotlighter")
    except Exception as error:
        from .errors import one_line, tell

        line = one_line(error)
        if line is None or os.environ.get("SPOTLIGHTER_DEBUG"):
            raise
        tell(f"error: {line}")
        sys.exit(1)
